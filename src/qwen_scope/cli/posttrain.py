"""`qwen-scope posttrain`: features as a training signal for the language model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_scope.errors import need
from qwen_scope.posttrain import ModelEvalRun, PrepareRun, RepetitionRun, RLData, RLRun, SFTData, SFTRun
from qwen_scope.scope import ScopeOptions

from . import options, output, posttrain_options, whose
from .commands import App
from .groups import grouped

if TYPE_CHECKING:
    from qwen_scope.posttrain import AlphaTable

SCOPE = ScopeOptions()

app = App(
    help="Train the language model with feature signals: prepare features, fine-tune, measure.", no_args_is_help=True
)
assert posttrain_options  # its options are those of the classes above


def check_packages() -> None:
    """Refuse to begin without the packages that train.

    Raises:
        NotFoundError: it says what to install.
    """
    need("posttrain", "trl", "peft", "datasets")


@app.command()
@partial(grouped, first=check_packages)
def prepare(
    run: PrepareRun,
    out: Annotated[Path, typer.Option("--out", "-o", help="The alpha table to write, a .json file.")],
    seed: posttrain_options.Seed = 0,
    asked: ScopeOptions = SCOPE,
    as_json: options.Json = False,
) -> None:
    """Find the features of a group of texts, and write what they are on every other group: the alpha table.

    A feature's score is its mean activation on the target less the mean of the other groups' means; with --onsets it is
    its effect on the first token of --script in answers that should not hold it. Without --layers the last two that
    have an SAE are used. Groups may be languages, styles or anything else that rows are labelled by.
    """
    from qwen_scope.files import check_output
    from qwen_scope.posttrain import prepare_table

    check_output(out, *given(run.source, run.onsets), *options.folders_of(asked), endings=[".json"])
    scope = options.open_asked(asked)
    with output.progress() as bar:
        table = prepare_table(scope, run, progress=bar)
    table.save(out)
    if as_json:
        output.print_json(table)
        return
    show_table(table)
    output.console().print(f"Written to {out}.", soft_wrap=True)


def show_table(table: AlphaTable) -> None:
    """The features with their scores and thresholds."""
    rows = []
    for one in table.layers:
        for j, feature in enumerate(one.features):
            others = [one.alpha[group][j] for group in table.groups if group != table.target]
            numbers = (one.alpha[table.target][j], min(others), max(others))
            rows.append((one.layer, feature, f"{one.scores[j]:.3g}", *(f"{number:.2f}" for number in numbers)))
    columns = ("layer", "feature", "score", f"alpha on {table.target}", "lowest elsewhere", "highest elsewhere")
    said = (
        "mean pre-activations"
        if table.made.get("alpha", "mean") == "mean"
        else f"pre-activations' {table.made['alpha']}"
    )
    output.show(f"Features of {table.target}, and their {said}", columns, rows)


@app.command()
@partial(grouped, first=check_packages)
def sft(data: SFTData, run: SFTRun, as_json: options.Json = False) -> None:
    """Fine-tune: plainly, with SASFT's auxiliary loss on features, or with a penalty on tokens.

    The result lies in OUT/model and loads like any model. Defaults are the published settings of SASFT, but for the
    scale of lambda: take a published lambda with --lambda-scale published. --monitor measures features on texts while
    training, into OUT/monitor.jsonl, and says when one of the table's moves far; with --monitor-prompts also when the
    model writes what they stand for.
    """
    from qwen_scope.posttrain import sft as train

    quiet()
    whose.say_whose()
    with output.progress() as bar:
        metrics = train(run, data, progress=bar)
    if as_json:
        output.print_json({"folder": str(run.out), **metrics})
        return
    alarms = metrics.pop("alarms", [])
    rows = [(name, f"{value:.4f}" if isinstance(value, float) else value) for name, value in metrics.items()]
    rows += [("alarms", len(alarms))] if data.monitor else []
    output.show(f"Fine-tuned ({run.method})", ("figure", "value"), rows)
    for alarm in alarms:
        place = alarm["concept"] or f"layer {alarm['layer']}"
        output.console().print(f"Alarm at step {alarm['step']}: {place} has moved far.", soft_wrap=True)
    output.console().print(f"Written to {run.out / 'model'}.", soft_wrap=True)


@app.command("eval")
@partial(grouped, first=check_packages)
def evaluate(run: ModelEvalRun, as_json: options.Json = False) -> None:
    """Measure a model: how often its answers hold a script they should not, and its loss on held-out rows."""
    from qwen_scope.posttrain import evaluate_model

    quiet()
    whose.say_whose()
    with output.progress() as bar:
        found = evaluate_model(run, progress=bar)
    if as_json:
        output.print_json(found)
    else:
        output.show("Measured", ("figure", "value"), [(name, str(value)) for name, value in found.items()])


@app.command()
@partial(grouped, first=check_packages)
def repetition(
    run: RepetitionRun,
    out: Annotated[Path, typer.Option("--out", "-o", help="The recipe to write, .json or .yaml.")],
    asked: ScopeOptions = SCOPE,
    as_json: options.Json = False,
) -> None:
    """Find the features that make answers repeat themselves without end, and check what they do.

    Answers that loop are sampled; features are ranked by their effect on the token with which a loop's next turn
    begins, and added by the smallest amount that makes half of the answers loop. On other prompts they should make more
    answers loop, suppressed within loops fewer go on. The recipe holds the figures either way; `rl` refuses one whose
    check does not hold.
    """
    from qwen_scope.files import check_output
    from qwen_scope.posttrain import repetition as find

    check_output(out, *given(run.source, run.looping), *options.folders_of(asked), endings=options.RECIPES)
    scope = options.open_asked(asked)
    with output.progress() as bar:
        recipe = find(scope, run, progress=bar)
    recipe.save(out)
    effect = recipe.effect
    if as_json:
        output.print_json({"recipe": str(out), "effect": dict(effect)})
        return
    chosen = zip(recipe.interventions, effect["effects"], strict=True)
    found = [(one.layer, one.feature, f"{nats:.3f}", f"{one.amount:.1f}") for one, nats in chosen]
    columns = ("layer", "feature", "effect (nats)", "amount")
    output.show(f"Features of {effect['loops']} looping answers", columns, found)
    names = ("normal", "amplified", "raises", "looping", "suppressed", "lowers")
    rows = [(name, *(f"{effect[name][key]:.1%}" for key in ("estimate", "low", "high"))) for name in names]
    output.show("Share of answers that loop", ("", "share", "low", "high"), rows)
    output.console().print(f"The check {'holds' if effect['causal'] else 'does not hold'}. Written to {out}.")


@app.command()
@partial(grouped, first=check_packages)
def rl(data: RLData, run: RLRun, as_json: options.Json = False) -> None:
    """Reinforcement learning with DAPO's loss; one answer of each group is generated under steering.

    The reward is the ordinary one and the policy that scores the answers is unsteered. The result lies in OUT/model.
    """
    from qwen_scope.posttrain import rl as train

    quiet()
    whose.say_whose()
    with output.progress() as bar:
        metrics = train(run, data, progress=bar)
    if as_json:
        output.print_json({"folder": str(run.out), **metrics})
        return
    show_trained(metrics, run.method, run.out)


def show_trained(metrics: dict[str, Any], method: str, out: Path) -> None:
    """What came out of a run."""
    shown = [(name, f"{value:.4f}") for name, value in metrics.items() if not isinstance(value, dict)]
    shares = {name: value for name, value in metrics.items() if isinstance(value, dict)}
    shown += [(name, f"{one['estimate']:.4f} [{one['low']:.4f}, {one['high']:.4f}]") for name, one in shares.items()]
    output.show(f"Trained ({method})", ("figure", "value"), shown)
    output.console().print(f"Written to {out / 'model'}.", soft_wrap=True)


def given(*sources: str | Path | None) -> list[str | Path]:
    """Of sources that may also be the lab or left out those that are files."""
    return [source for source in sources if source is not None and source != "lab"]


def quiet() -> None:
    """Silence the bars of transformers and datasets: there is one of ours."""
    import datasets

    options.quiet()
    datasets.disable_progress_bars()

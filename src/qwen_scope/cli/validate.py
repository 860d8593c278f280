"""`qwen-scope validate`: the verdict on a interventions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_scope.errors import FormatError
from qwen_scope.files import parse_value
from qwen_scope.text import CorpusOptions

from . import options, output, steer, sweep, targets
from .groups import LINES, grouped

if TYPE_CHECKING:
    from qwen_scope.features import Selectivity, Verdict
    from qwen_scope.scope import Scope
    from qwen_scope.steer import Target


@partial(grouped, without=["unit", "sample", "seed"])
def validate(
    prompts: sweep.Prompts,
    positive: Annotated[str, typer.Option("--positive", help="Texts with the property, read like prompts.")],
    negative: Annotated[str, typer.Option("--negative", help="Texts without it.")],
    unrelated: Annotated[str, typer.Option("--unrelated", help="Texts that have nothing to do with it.")],
    amount: Annotated[float, typer.Option("--amount", help="The amount that sweep proposes, in --unit.")] = 1.0,
    model: options.Model = "lab",
    sae: options.Sae = None,
    layer: steer.Layer = None,
    feature: steer.Feature = None,
    unit: steer.Unit = "resid_norm",
    where: steer.Where = "all",
    recipe: steer.RecipeFile = None,
    regex: targets.Regex = None,
    script: targets.Script = None,
    target_feature: targets.OtherFeature = None,
    rule: targets.Rule = None,
    lower: Annotated[bool, typer.Option("--lower", help="The feature is said to lower the target.")] = False,
    n_random: Annotated[int, typer.Option("--random", help="How many matched random features.")] = 19,
    n_shuffled: Annotated[int, typer.Option("--shuffled", help="How many shuffles of the examples' labels.")] = 9,
    max_perplexity: Annotated[float, typer.Option("--max-perplexity", help="Budget: times the unsteered.")] = 2.0,
    max_repetition: Annotated[float, typer.Option("--max-repetition", help="Budget: added to the unsteered.")] = 0.1,
    reference: sweep.Reference = None,
    tasks: Annotated[
        Path | None, typer.Option("--tasks", help='JSON lines {"prompt": ..., "answer": ...} that must not suffer.')
    ] = None,
    removal: Annotated[
        bool, typer.Option("--selectivity", help="Also compare removing the feature with removing a direction.")
    ] = False,
    chat: options.Chat = None,
    reading: CorpusOptions = LINES,
    max_new_tokens: steer.NewTokens = 40,
    sample: steer.Sample = False,
    temperature: steer.Temperature = None,
    seed: steer.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    k: options.K = None,
    as_json: options.Json = False,
) -> None:
    """Test whether a feature is causal: causal; causal, but breaks fluency; correlated only; entangled; no effect.

    The same prompts run under the feature, matched random features, the opposite sign, a difference of means, shuffled
    labels and prompting alone; the rules are printed with what was found. Fluency has the budget that sweep keeps.
    """
    from qwen_scope.features import Examples, Rules, answer_task, selectivity
    from qwen_scope.features import validate as run_validate
    from qwen_scope.steer import Decoding

    mode = options.check_chat(chat)
    how: dict[str, Any] = {"lower": lower, "n_random": n_random, "n_shuffled": n_shuffled, "chat": mode, "seed": seed}
    how["decoding"] = Decoding(max_new_tokens, sample, temperature, seed=seed)
    how["rules"] = Rules(perplexity_ratio=max_perplexity, repetition=max_repetition)
    one = None if recipe is not None else steer.one_intervention(layer, feature, "add", amount, unit, where)
    lines = [tuple(sweep.read_prompts(path, reading)) for path in (prompts, positive, negative, unrelated)]
    questions = None if tasks is None else read_tasks(tasks)
    texts = sweep.read_prompts(reference, reading) if reference is not None else []
    with output.status("opening the model"):
        scope = options.open_scope(model, sae, device, dtype, k)
    target = text_target(scope, regex, script, target_feature, rule)
    interventions = steer.from_recipe(scope, recipe) if recipe is not None else steer.placed(scope, one)
    examples = Examples(*lines[1:])
    removed = selectivity(scope, interventions, examples, seed=seed) if removal else None
    asked = {} if questions is None else {"the task": answer_task(scope, questions, chat=mode)}
    with output.progress() as report:
        verdict = run_validate(
            scope,
            interventions,
            target,
            lines[0],
            examples,
            reference=sweep.rows_to_score(scope, texts),
            tasks=asked,
            report=report,
            **how,
        )
    print_found(verdict, removed, as_json)


def print_found(verdict: Verdict, removed: Selectivity | None, as_json: bool) -> None:
    """The verdict, and beside it the comparison of removals where it was asked for."""
    if as_json:
        output.print_json(verdict.to_json() | ({"selectivity": removed.to_json()} if removed else {}))
        return
    print_verdict(verdict)
    if removed is not None:
        print_selectivity(removed)


def text_target(scope: Scope, regex: str | None, script: str | None, feature: str | None, rule: Path | None) -> Target:
    """The target that was named, of those that read texts."""
    found = targets.chosen_target(scope, regex, script, None, feature, rule)
    assert callable(found), "only continuations are not"
    return found


def read_tasks(path: Path) -> list[tuple[str, str]]:
    """Prompts and answers.

    Raises:
        FormatError: a line that is not an object with a prompt and an answer.
    """
    pairs = []
    for number, line in enumerate(sweep.read_lines_of(path), 1):
        try:
            data = parse_value(line, f"line {number} of {path.name}")
        except FormatError:
            data = None
        if not isinstance(data, dict) or not all(isinstance(data.get(key), str) for key in ("prompt", "answer")):
            raise FormatError(f'line {number} of {path.name} is not {{"prompt": "...", "answer": "..."}}')
        pairs.append((data["prompt"], data["answer"]))
    return pairs


def print_selectivity(found: Selectivity) -> None:
    """Both ways of removal side by side."""
    names = {
        "share": "taken away, share",
        "effect": f"effect: {found.measured_by}",
        "full": "effect with all taken away",
        "kl": "KL on unrelated text",
        "loss": "loss on unrelated text",
        "near_kl": "KL on negative examples",
        "near_loss": "loss on negative examples",
        "moved": "activation of other features moved there",
    }
    rows = [
        (name, *(str(v) if not isinstance(v, float) else v for v in (getattr(way, key) for way in ways)))
        for ways in [(found.features, found.direction)]
        for key, name in names.items()
    ]
    output.show("Removal at equal effect", ("", found.features.name, found.direction.name), rows)
    out = output.console()
    if not found.comparable:
        out.print("One of the two has no effect that can be told from zero, so their costs can't be compared.")
    else:
        out.print(f"The direction costs {found.extra_kl} more KL than the features, and {found.extra_loss} more loss.")


def print_verdict(verdict: Verdict) -> None:
    """The word, the rules with what was found, the conditions, and what else moved."""
    from rich.text import Text

    out = output.console()
    out.print(Text(f"Verdict: {verdict.outcome}", style="bold"))
    for reason in verdict.reasons:
        out.print(Text(f"  {reason}"))
    out.print()
    rows = [
        (
            condition.name,
            condition.effect.estimate,
            f"{condition.effect.low:.3g} to {condition.effect.high:.3g}",
            "no text" if condition.perplexity is None else condition.perplexity,
            condition.repetition,
        )
        for condition in verdict.conditions
    ]
    columns = ("generated under", "target", "95% interval", "perplexity", "repetition")
    output.show("The target under each, with the perplexity under the unsteered model", columns, rows)
    each = ", ".join(f"{condition.effect.estimate:.3g}" for condition in verdict.shuffled)
    out.print(f"Shuffled labels are {len(verdict.shuffled)} shuffles as one control: {each}")
    side = verdict.side
    out.print(
        f"On unrelated text: KL {side.kl}, under the difference of means {side.kl_of_direction}, loss {side.loss}"
    )
    moved = [(m.layer, m.feature, m.before, m.after) for m in side.moved]
    output.show("Other features that the change itself moves there", ("layer", "feature", "before", "after"), moved)

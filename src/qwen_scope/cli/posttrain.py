"""`qwen-scope posttrain`: features as a training signal for the language model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.errors import InputError, need
from qwen_scope.text import CorpusOptions

from . import options, output, whose
from .commands import App
from .groups import PARAGRAPHS, grouped
from .posttrain_data import (
    PROBES,
    check_run,
    given_files,
    labelled_texts,
    probe_texts,
    read_prompts,
    read_rows,
    training_samples,
)

if TYPE_CHECKING:
    from qwen_scope.posttrain import AlphaTable, Sample, SFTRun

app = App(
    help="Train the language model with feature signals: prepare features, fine-tune, measure.", no_args_is_help=True
)

Samples = Annotated[
    str, typer.Argument(metavar="CORPUS", help="A file, folder or dataset whose rows name their group, or 'lab'.")
]
PromptColumn = Annotated[str, typer.Option("--prompt-column", help="The prompt, where completions are learnt.")]
GroupColumn = Annotated[str, typer.Option("--group-column", help="The name of a row's group, such as its language.")]
Seed = Annotated[int, typer.Option("--seed", help="Of what is drawn.", **options.SEED)]

COMPLETIONS = CorpusOptions(column="completion")
COMPLETION_LINES = replace(COMPLETIONS, unit="line")


@app.command()
@partial(grouped, without=["chat"])
def prepare(
    corpus: Samples,
    target: Annotated[str, typer.Option("--target", help="The group whose features are wanted.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The alpha table to write, a .json file.")],
    model: options.Model = "lab",
    sae: options.Sae = None,
    layers: options.LastLayers = None,
    features: Annotated[int, typer.Option("--features", help="How many per layer.", min=1)] = 2,
    onsets: Annotated[
        str | None,
        typer.Option("--onsets", help="Rows to learn from, or 'lab': rank by what begins --script in their answers."),
    ] = None,
    script: Annotated[
        str | None, typer.Option("--script", help="The target's script, for --onsets: CJK, HANGUL, CYRILLIC, ...")
    ] = None,
    quantile: Annotated[
        float | None,
        typer.Option("--quantile", help="Alpha is this quantile of the pre-activations, not their mean.", min=0, max=1),
    ] = None,
    at_random: Annotated[
        int | None,
        typer.Option("--random", help="A seed that draws other features instead: the control.", **options.SEED),
    ] = None,
    group_column: GroupColumn = "group",
    reading: CorpusOptions = PARAGRAPHS,
    seed: Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    k: options.K = None,
    as_json: options.Json = False,
) -> None:
    """Find the features of a group of texts, and write what they are on every other group: the alpha table.

    A feature's score is its mean activation on the target less the mean of the other groups' means; with --onsets it is
    its effect on the first token of --script in answers that should not hold it. Without --layers the last two that
    have an SAE are used. Groups may be languages, styles or anything else that rows are labelled by.
    """
    check_packages()
    from qwen_scope.files import check_output
    from qwen_scope.posttrain import prepare as run
    from qwen_scope.posttrain import switches

    check_output(out, *given_files(corpus, onsets), *options.folders(model, sae), endings=[".json"])
    if (onsets is None) != (script is None):
        raise InputError("ranking by effect needs both: --onsets with rows, and --script with what begins in them")
    labelled = labelled_texts(corpus, replace(reading, seed=seed), group_column)
    with output.status("opening the model"):
        scope = options.open_scope(model, sae, device, dtype, k)
    begun = None
    if onsets and script:
        rows = training_samples(onsets, replace(COMPLETIONS, seed=seed + 1), "prompt", group_column)
        begun = switches(rows, scope.tokenizer, target, script)
    with output.progress() as bar:
        table = run(
            scope,
            labelled,
            target,
            layers=options.parse_layers(layers) if layers else None,
            features=features,
            onsets=begun,
            quantile=quantile,
            at_random=at_random,
            say=lambda stage, share: bar(stage, share, ""),
        )
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
@grouped
def sft(
    corpus: Samples,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the run.")],
    method: Annotated[
        str, typer.Option("--method", help="plain, features (SASFT) or penalty (on the target's own tokens).")
    ] = "features",
    table: Annotated[Path | None, typer.Option("--table", help="The alpha table that prepare has written.")] = None,
    model: options.Model = "lab",
    sae: options.Sae = None,
    layers: options.TableLayers = None,
    weight: Annotated[float, typer.Option("--weight", help="Lambda of the extra term.", min=0)] = 1e-3,
    lambda_scale: Annotated[
        str,
        typer.Option(
            "--lambda-scale",
            help="mean: lambda times the mean over a step; published: times the sum over its forward passes, as SASFT's"
            " code does, which at --batch 1 --accumulate 32 is about 32 times as strong.",
        ),
    ] = "mean",
    zero: Annotated[bool, typer.Option("--zero", help="Thresholds of zero instead of alpha.")] = False,
    enhance: Annotated[bool, typer.Option("--enhance", help="Lift the features on the target instead.")] = False,
    held_out: Annotated[str | None, typer.Option("--held-out", help="Rows to report the loss on.")] = None,
    prompt_column: PromptColumn = "prompt",
    group_column: GroupColumn = "group",
    reading: CorpusOptions = COMPLETIONS,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 5e-5,
    batch: Annotated[int, typer.Option("--batch", help="Samples per forward pass.", min=1)] = 1,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Forward passes per step.", min=1)] = 32,
    epochs: Annotated[float, typer.Option("--epochs", help="Times through the rows.")] = 1.0,
    max_steps: Annotated[int, typer.Option("--max-steps", help="-1 for whole epochs.")] = -1,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps.", min=0)] = 100,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens per sample, or per packed row.")] = 2048,
    lora: Annotated[int | None, typer.Option("--lora", help="Rank of adapters instead of all weights.")] = None,
    packing: Annotated[bool, typer.Option("--packing", help="Several samples in one row.")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute to save memory.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    monitor: Annotated[
        str | None,
        typer.Option("--monitor", help="Watch features on a text per line, rows with a text, or 'lab'."),
    ] = None,
    monitor_prompts: Annotated[
        str | None,
        typer.Option("--monitor-prompts", help="Also watch them in answers to these: rows with a prompt, or 'lab'."),
    ] = None,
    monitor_every: Annotated[
        int | None, typer.Option("--monitor-every", help="Steps between measurements. Default: 2% of the time.", min=1)
    ] = None,
    save_every: Annotated[int, typer.Option("--save-every", help="Steps between checkpoints; 0 for none.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    seed: Seed = 42,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    as_json: options.Json = False,
) -> None:
    """Fine-tune: plainly, with SASFT's auxiliary loss on features, or with a penalty on tokens.

    The result lies in OUT/model and loads like any model. Defaults are the published settings of SASFT, but for the
    scale of lambda: take a published lambda with --lambda-scale published. --monitor measures features on texts while
    training, into OUT/monitor.jsonl, and says when one of the table's moves far; with --monitor-prompts also when the
    model writes what they stand for.
    """
    given = locals()
    check_packages()
    from qwen_scope.posttrain import SFTRun, read_table

    quiet()
    check_run(out, model, sae, corpus, held_out, monitor, monitor_prompts, table)
    chosen = {"layers": tuple(options.parse_layers(layers) or ()) or None, "watch_every": monitor_every}
    run = SFTRun(**options.same_named(SFTRun, given) | chosen)
    found, unused = None if table is None else read_table(table), Counter[str]()
    # Whatever the seed of the training is, the rows are the same.
    learnt = training_samples(corpus, replace(reading, seed=0), prompt_column, group_column, model, unused)
    rest = replace(reading, sample=None, seed=1)
    kept = training_samples(held_out, rest, prompt_column, group_column, model) if held_out else []
    probe = probe_texts(monitor) if monitor else []
    if monitor_prompts and not (probe and found):
        raise InputError("--monitor-prompts goes with --monitor and --table: the table's features are read on answers")
    how = replace(rest, column=prompt_column, unit="line", seed=3)
    rows = read_rows(monitor_prompts, how, None, PROBES, model, held_out=True) if monitor_prompts else []
    carry_out(run, learnt, kept, found, probe, [row["prompt"] for row in rows], as_json, unused)


def carry_out(
    run: SFTRun,
    learnt: list[Sample],
    held_out: list[Sample],
    table: AlphaTable | None,
    probe: list[str],
    probe_prompts: list[str],
    as_json: bool,
    unused: Counter[str],
) -> None:
    """Train with a progress bar and print what came out."""
    from qwen_scope.posttrain import run_sft

    whose.say_whose()
    with output.progress() as bar:
        metrics = run_sft(
            run,
            learnt,
            held_out,
            table,
            probe=probe,
            probe_prompts=probe_prompts,
            unused=unused,
            progress=lambda step, steps, log: bar("training", step / max(1, steps), losses(log)),
        )
    if as_json:
        output.print_json({"folder": str(run.out), **metrics})
        return
    alarms = metrics.pop("alarms", [])
    rows = [(name, f"{value:.4f}" if isinstance(value, float) else value) for name, value in metrics.items()]
    rows += [("alarms", len(alarms))] if probe else []
    output.show(f"Fine-tuned ({run.method})", ("figure", "value"), rows)
    for alarm in alarms:
        place = alarm["concept"] or f"layer {alarm['layer']}"
        output.console().print(f"Alarm at step {alarm['step']}: {place} has moved far.", soft_wrap=True)
    output.console().print(f"Written to {run.out / 'model'}.", soft_wrap=True)


def check_packages() -> None:
    """Refuse to begin without the packages that train.

    Raises:
        NotFoundError: it says what to install.
    """
    need("posttrain", "trl", "peft", "datasets")


def quiet() -> None:
    """Silence the bars of transformers and datasets: there is one of ours."""
    import datasets

    options.quiet()
    datasets.disable_progress_bars()


def losses(log: dict[str, float]) -> str:
    """The losses of a line of the log."""
    return "  ".join(f"{name} {log[name]:.3g}" for name in ("loss", "feature_loss", "token_penalty") if name in log)


@app.command("eval")
@grouped
def evaluate(
    prompts: Annotated[
        str | None,
        typer.Argument(help="A .txt file with a prompt per line, rows with a prompt, or 'lab'.", show_default=False),
    ] = None,
    script: Annotated[
        str | None, typer.Option("--script", help="The script that answers should not hold: CJK, HANGUL, CYRILLIC, ...")
    ] = None,
    groups: Annotated[
        str | None, typer.Option("--groups", help="Only prompts of these groups, a,b,...; in the lab languages.")
    ] = None,
    held_out: Annotated[str | None, typer.Option("--held-out", help="Rows to report the loss on.")] = None,
    model: options.Model = "lab",
    samples: Annotated[int, typer.Option("--samples", help="Answers per prompt.", min=1)] = 8,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the draws.")] = 1.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw among the likeliest tokens that make up this share.")
    ] = 0.8,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Where an answer is cut off.", min=1)] = 2048,
    prompt_column: PromptColumn = "prompt",
    group_column: GroupColumn = "group",
    n: Annotated[int | None, typer.Option("-n", help="At most so many prompts, and rows to report on.", min=1)] = None,
    reading: CorpusOptions = COMPLETION_LINES,
    seed: Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure a model: how often its answers hold a script they should not, and its loss on held-out rows."""
    check_packages()
    from qwen_scope.model import load_model
    from qwen_scope.posttrain import code_switch_ratio, held_out_loss
    from qwen_scope.scope import model_source

    quiet()
    if (prompts is None) != (script is None):
        raise InputError("the code-switch ratio needs both: PROMPTS, and --script with what answers should not hold")
    if prompts is None and held_out is None:
        raise InputError("nothing to measure: give PROMPTS and --script, or --held-out, or both")
    wanted = [part.strip() for part in groups.split(",")] if groups else None
    asked = (
        []
        if prompts is None
        else read_prompts(prompts, replace(reading, column=prompt_column), group_column, wanted, n, model)
    )
    with output.status("opening the model"):
        loaded = load_model(model_source(model), device=device, dtype=dtype)
    whose.say_whose()
    found: dict[str, object] = {"model": model}
    if script is not None:
        with output.progress() as bar:
            switch = code_switch_ratio(
                loaded.model,
                loaded.tokenizer,
                asked,
                script,
                samples=samples,
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                seed=seed,
                report=lambda share: bar("answers", share, ""),
            )
        found |= {"script": script, "prompts": len(asked), "samples": samples, "code_switch_ratio": switch.ratio}
    if held_out is not None:
        rows = training_samples(
            held_out, replace(reading, sample=reading.sample or n, seed=1), prompt_column, group_column, model
        )
        with output.status("measuring the loss"):
            found["held_out_loss"] = held_out_loss(loaded, rows)
    if as_json:
        output.print_json(found)
    else:
        output.show("Measured", ("figure", "value"), [(name, str(value)) for name, value in found.items()])

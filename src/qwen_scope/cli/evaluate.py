"""`qwen-scope eval`: measure SAEs, and whether they fit another checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_scope.text import CorpusOptions
from qwen_scope.train import EvalRun

from . import commands, names, options, output, whose
from .groups import OPTIONS, Read, grouped
from .workers import is_first

if TYPE_CHECKING:
    from qwen_scope.train import EvalResult

SHOWN = 5  # features that move most, of each layer
WEAK = 0.5  # explained variance on an SAE's own model below which it is said


def places(typed: list[str]) -> str | tuple[str, ...]:
    """Where documents are: one place, or several."""
    return typed[0] if len(typed) == 1 else tuple(typed)


Places = Annotated[list[str], options.DOCUMENTS, Read(places)]
OPTIONS[EvalRun] = {
    "data": Places,
    "model": options.Model,
    "sae": options.Sae,
    "post": Annotated[str | None, typer.Option("--post", help="Another checkpoint: do these SAEs fit it, too?")],
    "remember": Annotated[
        bool, typer.Option("--remember/--no-remember", help="Keep that verdict, to be shown wherever the pair is used.")
    ],
    "layers": Annotated[options.Layers, Read(options.layers_tuple)],
    "tokens": Annotated[int | None, typer.Option("--tokens", help="About how many. Default: 65536.", min=2)],
    "hold_out": Annotated[
        int | None,
        typer.Option(
            "--hold-out",
            min=0,
            help="N reads every N-th document, those that training keeps out; 0 reads all. Default: what the SAEs' run"
            " kept out, if the text is its own.",
        ),
    ],
    "corpus": CorpusOptions,
    "context_length": Annotated[
        int | None, typer.Option("--context-length", help="Tokens per row. Default: 256.", min=2)
    ],
    "batch_size": Annotated[
        int | None, typer.Option("--batch-size", help="Rows per forward pass. Default: 16.", min=1)
    ],
    "counted": Annotated[options.Count, Read(options.parse_count)],
    "loss": Annotated[bool, typer.Option("--loss/--no-loss", help="Measure what the predictions lose, too.")],
    "parallel": Annotated[
        str,
        typer.Option("--parallel", help="Under torchrun: data, a share of the rows for each process."),
        Read(partial(options.one_of, "--parallel", known=("alone", "data")), "alone"),
    ],
    "seed": Annotated[int, typer.Option("--seed", help="Of the resampling of intervals.", **options.SEED)],
    "device": options.Device,
    "dtype": options.Dtype,
}


def seeded(run: Any, seed: int) -> Any:
    """A run whose sample is drawn by its seed; without a sample the lab's documents are those of its first seed."""
    return replace(run, corpus=replace(run.corpus, seed=0 if run.corpus.sample is None else seed))


@grouped
def evaluate(run: EvalRun, as_json: options.Json = False) -> None:
    """Measure SAEs: reconstruction, sparsity, and the loss of the model.

    Of the text that the SAEs were trained on, the documents that were kept out are read, as the run read them.
    With --post also whether they fit another checkpoint, by a fixed rule and with 95% intervals; without --model, where
    the SAEs are not the lab's, the other checkpoint is measured alone. The verdict is shown wherever the pair is used.
    """
    from qwen_scope.train import run_eval

    options.quiet()
    first = is_first(run.parallel, "eval")
    run = without_base(run)
    if run.model is not None:
        whose.refuse_other_saes(run.sae)
        whose.say_whose()
    with output.progress() if first else nullcontext() as report:
        result = run_eval(seeded(run, run.seed), progress=report)
    if not first:
        return
    names.know(run.sae or str(result.sae))
    data = plain(result)
    if as_json:
        output.print_json(data)
        return
    show_quality(f"{result.sae} on {run.model}", data["quality"])
    read = f"the documents kept out of training, one in {result.held_out}" if result.held_out else "all documents"
    output.console().print(f"Measured on {read}.", soft_wrap=True)
    if data["transfer"]:
        show_transfer(f"The same SAEs on {run.post}, with 95% intervals", data["transfer"])
    if result.fits:
        show_fits(run, result)
    elif run.post is not None:
        output.console().print("No verdict: whether SAEs fit is judged by the loss, too; leave out --no-loss.")


def without_base(run: EvalRun) -> EvalRun:
    """The run without the lab as the SAEs' own model, where nobody named one and the SAEs are not the lab's."""
    ctx = commands.running()
    if run.post is None or run.sae is None or ctx is None or not whose.left_out(ctx, "model"):
        return run
    if whose.saes_of_lab(run.sae):
        return run
    output.say(
        f"qwen-scope: no --model was given, so the SAEs are measured on {run.post} alone; with the model that they were"
        " trained on, --model BASE, the two are compared"
    )
    return replace(run, model=None)


def plain(result: EvalResult) -> dict[str, Any]:
    post = result.counted_post
    return {
        "quality": {str(point): found.plain() for point, found in result.quality.items()},
        "transfer": {str(point): found.plain() for point, found in result.transfer.items()},
        "counted": result.counted.to_json(),
        "held_out": result.held_out,
        "fits": {str(point): found.plain() for point, found in result.fits.items()},
        "counted_post": None if post is None else post.to_json(),
        "remembered": [str(path) for path in result.remembered],
    }


def show_quality(title: str, quality: dict[str, Any]) -> None:
    """The figures people ask for first; the rest is in the JSON."""
    if not quality:
        return
    columns = {
        "fvu": "FVU", "fvu_without_first": "w/o first", "explained_variance_per_token": "EV/token", "cosine": "cosine",
        "l0": "L0", "dead": "dead", "ce_recovered": "CE rec.", "kl": "KL", "left_out": "left out",
    }  # fmt: skip
    if all(figures["reasons"]["first"] for figures in quality.values()):
        del columns["fvu_without_first"]  # the same figure
    rows = [(point, *(figures.get(name) for name in columns)) for point, figures in quality.items()]
    output.show(title, ("hook point", *columns.values()), rows)
    from qwen_scope.text import summary

    said = {point: summary(figures["reasons"]) for point, figures in quality.items()}
    for line in dict.fromkeys(said.values()):
        where = [point for point, one in said.items() if one == line]
        output.console().print(line if len(where) == len(said) else f"{', '.join(where)}: {line}", soft_wrap=True)


def show_transfer(title: str, transfer: dict[str, Any]) -> None:
    names = ("fvu_base", "fvu_post", "fvu_rise", "jaccard", "cosine_post")
    rows = [(point, *(interval(figures[name]) for name in names)) for point, figures in transfer.items()]
    output.show(title, ("hook point", "FVU base", "FVU here", "rise", "Jaccard", "cosine"), rows)


def interval(estimate: dict[str, float]) -> str:
    """A value and the ends of its interval."""
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def show_fits(run: EvalRun, result: EvalResult) -> None:
    """The verdicts, what they rest on, and the features that move most."""
    fits = plain(result)["fits"]
    names = {"ev_base": "EV base", "ev_post": "EV here", "ce_base": "CE rec. base", "ce_post": "CE rec. here"}
    here = {name: title for name, title in names.items() if any(name in one["figures"] for one in fits.values())}
    rows = []
    for point, one in fits.items():
        parts = {"": one, **one["phases"]}
        rows += [
            (point if not phase else f"  {phase}", part["verdict"], *(cell(part["figures"], name) for name in here))
            for phase, part in parts.items()
        ]
    output.show(f"Do they fit {run.post}?", ("hook point", "verdict", *here.values()), rows)
    out = output.console()
    for point, one in fits.items():
        for why in one["why"]:
            out.print(f"{point}: {one['verdict']}: {why}", soft_wrap=True)
        base = one["figures"].get("ev_base")
        if base is not None and base["value"] < WEAK:
            out.print(
                f"{point}: weak on its own base, with an explained variance of {base['value']:.2f}", soft_wrap=True
            )
    some = next(iter(fits.values()))
    both = "both checkpoints" if run.model is not None else "the checkpoint"
    out.print(
        f"Over {some['tokens']:,} tokens that count on {both}, in {some['documents']:,} documents; {sinks_of(result)}.",
        soft_wrap=True,
    )
    show_moves(fits)
    if result.remembered:
        out.print(f"Remembered in {result.remembered[0].parent}, and shown wherever the pair is used.", soft_wrap=True)


def cell(figures: dict[str, Any], name: str) -> str:
    """A figure, if there is one."""
    return interval(figures[name]) if name in figures else "none"


def sinks_of(result: EvalResult) -> str:
    """How sinks of the other checkpoint were told."""
    post = result.counted_post
    if post is None or not post.norms:
        return "no token was left out for its norm"
    limits = [post.norms.get(str(point)) for point in result.fits]
    said = ", ".join("none" if limit is None else f"{limit:.4g}" for limit in limits)
    return f"sinks have a norm above {said}, measured on {post.sample}"


def show_moves(fits: dict[str, Any]) -> None:
    """The features whose firing rate changes most."""
    moves = {point: one["moves"] for point, one in fits.items() if one["moves"] is not None}
    rows = [
        (
            point, one["feature"], one["rate_base"], one["rate_post"], one["mean_base"], one["mean_post"],
            min(one["q_rate"], one["q_mean"]),
        )
        for point, found in moves.items()
        for one in found["features"][:SHOWN]
    ]  # fmt: skip
    if rows:
        columns = ("hook point", "feature", "rate base", "rate here", "mean base", "mean here", "q")
        output.show("Features that move most", columns, rows)
    for point, found in moves.items():
        output.console().print(
            f"{point}: {found['moved']:,} of {found['tested']:,} features that were tested move (q <= 0.05)",
            soft_wrap=True,
        )

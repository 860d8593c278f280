"""`qwen-scope score`: figures of SAEs beside those of controls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.score import NAMES, ScoreRun
from qwen_scope.text import CorpusOptions

from . import options, output, whose
from .evaluate import seeded
from .groups import OPTIONS, Read, grouped

if TYPE_CHECKING:
    from qwen_scope.score import Cost, Scoreboard

OPTIONS[ScoreRun] = {
    "sae": Annotated[str, typer.Argument(metavar="SAE", help="SAEs: a group's name or Hub id, or a folder.")],
    "data": options.Documents,
    "out": Annotated[Path, typer.Option("--out", "-o", help="The folder of the scoreboard; the same command goes on.")],
    "model": options.Model,
    "layers": Annotated[options.Layers, Read(options.layers_tuple)],
    "corpus": CorpusOptions,
    "tokens": Annotated[int, typer.Option("--tokens", help="About how many to measure on.", min=2)],
    "train_tokens": Annotated[int, typer.Option("--train-tokens", help="How many each control is trained on.", min=1)],
    "controls": Annotated[bool, typer.Option("--controls/--no-controls", help="Measure the controls, too.")],
    "suites": Annotated[
        str | None,
        typer.Option("--suites", help=f"Further figures: {', '.join(NAMES)}. Default: all that can be measured."),
        Read(lambda text: options.names_tuple(text) or None),
    ],
    "probes": Annotated[
        Path | None,
        typer.Option("--probes", help="Labelled texts: the wheel or folder of sae-probes (pip download sae-probes)."),
    ],
    "columns": Annotated[
        str | None,
        typer.Option("--columns", help="Labelled texts: columns of the corpus that are labels, as language,register."),
        Read(lambda text: options.names_tuple(text) or None),
    ],
    "datasets": Annotated[
        str | None,
        typer.Option("--datasets", help="Of them these, as in 87_glue_cola,language=de. Default: all."),
        Read(lambda text: options.names_tuple(text) or None),
    ],
    "rows": Annotated[int, typer.Option("--rows", help="Texts of each dataset at most.", min=40)],
    "context_length": Annotated[int, typer.Option("--context-length", help="Tokens per row.", min=2)],
    "batch_size": Annotated[int, typer.Option("--batch-size", help="Rows per forward pass.", min=1)],
    "batch": Annotated[int, typer.Option("--batch", help="Tokens per step of training.", min=1)],
    "hold_out": Annotated[
        int, typer.Option("--hold-out", help="Measure on every N-th document, train controls on the others.", min=2)
    ],
    "dtype": options.Dtype,
    "device": options.Device,
    "seed": Annotated[int, typer.Option("--seed", help="Of the controls.", **options.SEED)],
}


@grouped
def score(
    run: ScoreRun,
    html: Annotated[Path | None, typer.Option("--html", help="Write one HTML file that opens by itself.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many tokens it takes, and stop.")] = False,
    time: Annotated[
        bool, typer.Option("--time", help="Time a few rows, say how long it would take, and stop.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Measure SAEs with and without sinks, each figure as a gain over controls that learnt less.

    Controls of the same width and k are trained here on the same text: with a random decoder that stays, with an
    encoder that stays, and random directions alone. Stopped in whatever way, the same command goes on.
    """
    from qwen_scope.files import check_output, write_text
    from qwen_scope.score import cost, scoreboard_html
    from qwen_scope.score import score as run_score

    options.quiet()
    whose.refuse_other_saes(run.sae)
    if html is not None:
        check_output(html, *options.folders(run.sae, run.model))
    run = seeded(run, run.seed)
    if dry_run or time:
        with output.status("timing a few rows" if time else "counting"):
            found = cost(run, time)
        if as_json:
            output.print_json(found)
        else:
            print_cost(found)
        return
    cost(run)
    whose.say_whose()
    with output.progress() as bar:
        board = run_score(run, progress=bar)
    if html is not None:
        write_text(html, scoreboard_html(board))
    if as_json:
        output.print_json(board.to_json())
    else:
        print_board(board)


def print_cost(found: Cost) -> None:
    """Tokens by stage, and minutes where they were measured."""
    out = output.console()
    out.print(f"{found.layers} layers, {found.cells} rows of figures, {found.done} of them done.")
    stages = {
        "reconstruction": f"{found.read:,} to the SAE's layer, {found.measured:,} through the model",
        "controls": f"{found.trained:,} to train on",
        **{suite: f"about {tokens:,}" for suite, tokens in found.suites.items()},
    }
    minutes = found.minutes or {}
    rows = [
        (stage, tokens, *([round(minutes.get(stage, 0.0), 1)] if minutes else [])) for stage, tokens in stages.items()
    ]
    output.show("What is left to do", ("stage", "tokens", *(["minutes"] if minutes else [])), rows)
    if minutes:
        out.print(
            f"About {sum(minutes.values()):.0f} minutes as fast as now; fits and ablations of suites come on top."
        )


def print_board(board: Scoreboard) -> None:
    """A table per layer, with and without sinks, and where a control does as well."""
    from qwen_scope.score import SUITES, not_measured, score_table, suite_table

    out = output.console()
    for layer in board.cells:
        for sinks in ("without sinks", "with sinks"):
            output.show(f"Layer {layer}, {sinks}", *score_table(board, layer, sinks))
        for suite in board.suites:
            if layer in board.suites[suite]:
                output.show(f"Layer {layer}, {SUITES[suite].says}", *suite_table(board, suite, layer))
    for said in not_measured(board):
        out.print(f"Not measured: {said}.")
    for layer, arm, sinks, figure in board.not_better():
        out.print(f"Layer {layer}, {sinks}: {arm} does as well by {figure}.")

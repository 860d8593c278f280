"""`qwen-scope lab`: the bundled lab, what it holds and how it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen_scope.errors import NotFoundError, foreign

from . import options, output
from .commands import App

app = App(help="The bundled lab: show texts with known factors, build it again.", no_args_is_help=True)


@app.command()
def build(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; must be new or hold a lab.")],
    family: Annotated[
        str, typer.Option("--family", help="dense (Qwen3), moe (Qwen3-MoE) or hybrid (Qwen3.5).")
    ] = "dense",
    small: Annotated[
        bool | None, typer.Option("--small/--full", help="Two minutes or half an hour. Default: full for dense.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.", **options.SEED)] = 0,
    as_json: options.Json = False,
) -> None:
    """Make corpus, tokenizer, language model and SAEs anew and measure them: the metrics come back, not the bytes."""
    from dataclasses import replace

    from qwen_scope.foundry import FULL, SMALL, build, card

    config = replace(SMALL if (family != "dense" if small is None else small) else FULL, family=family, seed=seed)
    with output.progress() as progress:
        metrics = build(out, config, progress)
    if as_json:
        output.print_json(metrics)
    else:
        output.write(card(metrics))


@app.command()
def card(
    folder: Annotated[Path | None, typer.Argument(help="A built lab. Default: the bundled one.")] = None,
    as_json: options.Json = False,
) -> None:
    """Print the card of a lab: data, sizes, seeds, losses, per-factor F1, and what it is not."""
    from qwen_scope.files import read_object
    from qwen_scope.foundry import card
    from qwen_scope.sae import catalog

    where = folder or Path(catalog.find("lab").model).parent
    path = where / "metrics.json"
    if not path.is_file():
        raise NotFoundError(
            f"{path.parent} holds no lab: there is no metrics.json; make one with: qwen-scope lab build -o DIR"
        )
    metrics = read_object(path)
    if as_json:
        output.print_json(metrics)
        return
    with foreign(f"{path} does not hold the metrics of a lab"):
        text = card(metrics)
    output.write(text)


@app.command()
def panel(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; a stopped run goes on.")],
    as_json: options.Json = False,
) -> None:
    """Train a panel of small models and score them on the lab's benchmarks: what benchmark analyses are tried on."""
    from qwen_scope.foundry import build_panel

    with output.progress() as progress:
        made = build_panel(out, progress=progress)
    if as_json:
        output.print_json(made)
        return
    rows = [(name, *scores.values()) for name, scores in made["accuracy"].items()]
    output.show("Accuracy of every checkpoint", ("benchmark", *made["models"]), rows)


@app.command()
def examples(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; an older copy is replaced.")],
    seed: Annotated[int, typer.Option("--seed", help="Of the texts.", **options.SEED)] = 0,
    as_json: options.Json = False,
) -> None:
    """Write small files to try the other commands on: texts, prompts, tasks and a corpus with columns."""
    from qwen_scope.files import write_text
    from qwen_scope.lab import example_files

    output.hold(out)
    made = example_files(seed)
    for name, text in made.items():
        write_text(out / name, text)
    if as_json:
        output.print_json({"folder": str(out), "files": list(made)})
        return
    rows = [(name, text.count("\n"), text.partition("\n")[0]) for name, text in made.items()]
    output.show(f"Written to {out}", ("file", "lines", "the first"), rows)


@app.command()
def texts(
    n: Annotated[int, typer.Option("-n", help="How many documents.", min=1)] = 5,
    kind: Annotated[str | None, typer.Option("--kind", help="talk, chat, arithmetic, code, prose, ...")] = None,
    language: Annotated[str | None, typer.Option("--language", help="zh, ja, ko, ru, ar, en, fr, de or es.")] = None,
    register: Annotated[str | None, typer.Option("--register", help="plain, polite, rude or archaic.")] = None,
    split: Annotated[
        str, typer.Option("--split", help="train, heldout_sentences, heldout_templates or heldout_combinations.")
    ] = "train",
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.", **options.SEED)] = 0,
    as_json: options.Json = False,
) -> None:
    """Print documents of the lab's corpus with their factors, one JSON object per line with --json."""
    from rich.text import Text

    from qwen_scope.lab import documents

    chosen = documents(
        split=split,
        seed=seed,
        n=n,
        kinds=[kind] if kind else None,
        languages=[language] if language else None,
        registers=[register] if register else None,
    )
    out = output.console()
    for document in chosen:
        if as_json:
            output.print_json_line({**vars(document), "factors": dict(document.factors), "spans": len(document.spans)})
            continue
        title = " / ".join(x for x in (document.kind, document.language, document.register) if x)
        out.print(Text(f"{document.id}  {title}", style="bold"))
        out.print(Text(document.text + "\n"))

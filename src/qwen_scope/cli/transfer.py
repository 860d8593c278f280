"""`qwen-scope classify transfer`: what the documents of one language teach about another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qwen_scope.errors import InputError
from qwen_scope.scope import ScopeOptions
from qwen_scope.text import CorpusOptions

from . import options, output
from .analyze import OUT, show_result
from .groups import LINES, grouped

FEWEST = 4  # documents of a class, so that some teach and some are held out
SCOPE = ScopeOptions()


@grouped
def transfer(
    source: Annotated[
        str, typer.Argument(metavar="CORPUS", help="Documents with their language and class in columns, or 'lab'.")
    ],
    wanted: Annotated[
        str, typer.Option("--positive", help="COLUMN=VALUE: the class, such as register=rude; any other is negative.")
    ],
    groups: Annotated[str, typer.Option("--groups", help="The column that names the language.")] = "language",
    each: Annotated[
        int, typer.Option("--documents", help="How many documents of each class and language of the lab.", min=FEWEST)
    ] = 60,
    top: Annotated[int, typer.Option("--top", help="How many features of one layer, joined by OR.", min=1)] = 2,
    shared: Annotated[int, typer.Option("--shared", help="Top features compared between languages.", min=1)] = 10,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the third that is held out, and of intervals.", **options.SEED)
    ] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help=OUT)] = None,
    reading: CorpusOptions = LINES,
    asked: ScopeOptions = SCOPE,
    layers: options.Layers = None,
    as_json: options.Json = False,
) -> None:
    """Test what each language teaches on every language, and how many features languages share.

    The rule of each language, and the usual classifiers from the same seeds, go unchanged to the held-out third of the
    others: F1 from row to column. Rows of the corpus without a language or a class are left out.
    """
    from qwen_scope.analysis import across, by_language, datasets_of
    from qwen_scope.scope import ExtractOptions
    from qwen_scope.text import lab_corpus, tell_unused

    what, sign, value = (part.strip() for part in wanted.partition("="))
    if not (what and sign and value):
        raise InputError(f"--positive is COLUMN=VALUE, such as register=rude, not {wanted!r}")
    corpus = lab_corpus(what, value, groups, each, seed) if source == "lab" else options.read(source, reading)
    output.hold(out, *options.files(source), *options.folders_of(asked))
    scope = options.open_asked(asked)
    where = scope.check_layers(options.parse_layers(layers))
    counted = asked.counted
    with output.progress() as bar:
        how = ExtractOptions(counted=counted, chat=reading.chat)
        read = scope.firings(corpus, where, how, name="documents", progress=bar)
    tell_unused(read.left_out, len(read) + sum(read.left_out.values()), corpus.name)
    found = datasets_of(read)
    languages, left_out = by_language(
        found, read.residuals, read.metas, group=groups, column=what, value=value, seed=seed
    )
    with output.status("comparing classifiers"):
        result = across(languages, top=top, shared=shared, seed=seed)
    show_result(f"{wanted} across {groups}", add_notes(result, left_out), out, as_json)


def add_notes(result: Any, notes: list[str]) -> Any:
    """The result with further sentences in front."""
    from dataclasses import replace

    return replace(result, notes=(*notes, *result.notes))

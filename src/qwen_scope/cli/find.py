"""`qwen-scope find`: features by what they tell apart, promote, are near to, or are called."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_scope.errors import InputError
from qwen_scope.features import FindOptions, PromoteOptions
from qwen_scope.scope import ScopeOptions
from qwen_scope.text import CorpusOptions

from . import changes, documents, names, options, output, show
from .groups import LINES, OPTIONS, grouped

if TYPE_CHECKING:
    from qwen_scope.features import Findings
    from qwen_scope.scope import Scope
    from qwen_scope.store import FeatureStore

OPTIONS[PromoteOptions] = {
    "promotes": Annotated[str | None, typer.Option("--promotes", help="Features that promote these words.")],
    "lens": Annotated[
        Path | None, typer.Option("--lens", help="A Jacobian lens (lens fit), through which --promotes reads features.")
    ],
}
PROMOTED = PromoteOptions()
FOUND = ("layer", "feature", "reduction", "threshold", "f1", "auroc", "difference", "p", "q", "significant")
SETS = "A corpus, as extract reads it; lab:language=de; with a STORE language=de"


@partial(grouped, without=["asked.model"])
def find(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[STORE]", help="Look in a store that extract has written.")
    ] = None,
    positive: Annotated[str | None, typer.Option("--positive", help=f"Documents with the property. {SETS}.")] = None,
    negative: Annotated[
        str | None, typer.Option("--negative", help="Documents without it. Default with a STORE: all others.")
    ] = None,
    groups: Annotated[
        str | None, typer.Option("--groups", help="Features of each value of a metadata column, such as language.")
    ] = None,
    repetition: Annotated[
        str | None, typer.Option("--repetition", help="Features that rise as documents repeat; 'all' with a STORE.")
    ] = None,
    promoted: PromoteOptions = PROMOTED,
    near: Annotated[str | None, typer.Option("--near", help="Features near one, named LAYER/FEATURE.")] = None,
    words: Annotated[str | None, typer.Option("--label", help="Features by words of their labels and notes.")] = None,
    search: FindOptions = changes.FIND,
    each: Annotated[int, typer.Option("--documents", help="How many documents of the lab.", min=4)] = 100,
    reading: CorpusOptions = LINES,
    model: options.StoreModel = None,
    asked: ScopeOptions = changes.SCOPE,
    layers: options.Layers = None,
    as_json: options.Json = False,
) -> None:
    """Find features: one of --positive, --groups, --repetition, --promotes, --near or --label.

    Two sets of documents are compared over the whole dictionary, or with --phase thinking --against answer two phases
    of a store's conversations. Half of each set chooses, the other half measures; q is adjusted for the number of
    features that were looked at.
    """
    promotes, lens = promoted.promotes, promoted.lens
    questions = [positive, groups, repetition, promotes, near, words]
    asked_of = sum(one is not None for one in questions)
    if asked_of > 1 or (not asked_of and search.against is None):
        raise InputError(
            "ask one thing: --positive (with --negative), --phase with --against, --groups, --repetition, --promotes,"
            " --near or --label"
        )
    if search.phases is not None and (folder is None or (asked_of and positive is None)):
        raise InputError("--phase compares documents of a STORE: with --positive, or alone with --against")
    store = names.of_store(folder) if folder is not None else None
    wanted, n, level = options.parse_layers(layers), search.n, search.level

    def scope() -> Scope:
        with output.status("opening the model"):
            return show.scope_of(store, model, asked)

    if store is not None and asked.counted is not None:
        raise InputError(
            "a store keeps the activations of the tokens that counted when it was made; leave --count away, or extract"
            " the documents anew with --count all"
        )
    if store is not None and promotes is None and near is None:
        show.check_saes(store, model, asked.sae, wanted, asked.k)
    if lens is not None and promotes is None:
        raise InputError("--lens reads what features dispose the model to say; give --promotes WORDS with it")
    if words is not None:
        print_labels(need(store, "--label"), words, n, as_json)
    elif promotes is not None:
        print_top_logits(scope, promotes, wanted, n, lens, as_json)
    elif near is not None:
        print_near(near, store, None if store and model is None and asked.sae is None else scope(), n, as_json)
    elif repetition is not None:
        print_repeats(repetition, store, scope, wanted, n, each, reading, level, as_json)
    elif groups is not None:
        print_groups(need(store, "--groups"), groups, wanted, n, search.seed, as_json)
    elif store is not None:
        print_findings(sets_in_store(store, positive, negative, wanted, search), as_json)
    else:
        print_findings(sets_of_texts(scope, str(positive), negative, wanted, each, reading, search), as_json)


def sets_in_store(
    store: FeatureStore, positive: str | None, negative: str | None, layers: list[int] | None, search: FindOptions
) -> Findings:
    """What tells two sets of a store's documents apart."""
    import numpy as np

    from qwen_scope.features import find_in_store, remember_findings

    chosen = None if positive is None else documents.documents_of(store, positive)
    others = None if negative is None else documents.documents_of(store, negative)
    if chosen is not None and others is not None and len(np.intersect1d(chosen, others)):
        raise InputError(f"some documents are in both sets: {positive} and {negative}")
    with output.status("reading the store"):
        found = find_in_store(store, chosen, others, layers, search)
    if positive is not None and search.phases is None:
        remember_findings(store, found, positive, negative or "all others")
    return found


def sets_of_texts(
    scope: Any, positive: str, negative: str | None, layers: list[int] | None, each: int, reading: CorpusOptions,
    search: FindOptions,
) -> Findings:  # fmt: skip
    """What tells two sets of texts apart; the model is opened once they are read."""
    from qwen_scope.features import find as run

    if negative is None:
        raise InputError("name documents without the property with --negative")
    # Another seed, so that sets that overlap by name share no document.
    asked = (reading, replace(reading, seed=reading.seed + 1))
    texts = [documents.texts_of(p, each, how) for p, how in zip((positive, negative), asked, strict=True)]
    opened = scope()
    with output.progress() as progress:
        return run(opened, texts[0], texts[1], layers, search, chat=reading.chat, progress=progress)


def print_findings(found: Findings, as_json: bool) -> None:
    """A table of findings, and how many there are in all."""
    from rich.text import Text

    from qwen_scope.report import Table
    from qwen_scope.text import summaries

    if as_json:
        output.print_json(found)
        return
    rows = [
        (
            one.layer,
            one.feature,
            f"{one.reduction} > {one.threshold:.3g}",
            str(one.f1),
            str(one.auroc),
            str(one.difference),
            one.q,
        )
        for one in found.found
        if one.significant
    ]
    title = f"{found.positives} documents against {found.negatives}, ranked by {found.by}; measured on the other half"
    said = f"{found.significant} features pass a false discovery rate of {found.level:g} among {found.tests:,} tests."
    data = Table.of("Features that tell the documents apart", found.found, FOUND)
    columns = ("layer", "feature", "is above", "F1", "AUROC", "difference", "q")
    output.show(title, columns, rows, data)
    if rows and len(rows) < len(found.found):
        said += f" Of the first {len(found.found)}, {len(found.found) - len(rows)} do not and are left out."
    elif not rows and found.significant:
        said = f"None of the first {len(found.found)} is significant; {said}"
    elif not rows:
        said = f"Nothing is significant: {said}"
    output.console().print(Text("\n".join([said, *summaries(found.left_out)])))


def print_groups(store: FeatureStore, column: str, layers: list[int] | None, n: int, seed: int, as_json: bool) -> None:
    """The language score for every value of a column."""
    import json

    from qwen_scope.features import language_features, pool_store
    from qwen_scope.report import Table

    values = {json.loads(text).get(column) for text in store.sql("SELECT meta FROM documents")["meta"].to_pylist()}
    names = sorted(value for value in values if isinstance(value, str))
    if len(names) < 2:
        raise InputError(f"the column {column!r} has {len(names)} texts as values in {store.folder}; two are needed")
    with output.status("reading the store"):
        pooled = {name: pool_store(store, store.where((column, name, True)), layers) for name in names}
    found = language_features(pooled, n, seed=seed)
    if as_json:
        output.print_json(found)
        return
    told = [one for one in found if one.score.low > 0]
    rows = [(one.language, one.layer, one.feature, str(one.score), one.mean, max(one.others.values())) for one in told]
    columns = (column, "layer", "feature", "score", "mean here", "highest mean elsewhere")
    title = "Mean activation less the mean over the others"
    output.show(title, columns, rows, Table.of(title, found, ("language", "layer", "feature", "score")))
    if len(told) < len(found):
        output.console().print(f"Left out: {len(found) - len(told)} of {len(found)}, whose score's interval reaches 0.")


def print_repeats(
    spec: str, store: FeatureStore | None, scope: Any, layers: list[int] | None, n: int, each: int,
    reading: CorpusOptions, level: float, as_json: bool,
) -> None:  # fmt: skip
    """Features that rise from the first occurrence of a token to its last repeat."""
    from qwen_scope.features import repeat_features, repeats_in_store, repeats_in_texts
    from qwen_scope.report import Table

    if store is not None:
        chosen = None if spec == "all" else documents.documents_of(store, spec).tolist()
        changes = repeats_in_store(store, layers, documents=chosen)
    else:
        texts = documents.texts_of(spec, each, replace(reading, seed=0) if reading.sample is None else reading)
        changes = repeats_in_texts(scope(), texts, layers, chat=reading.chat)
    found = repeat_features(changes, n, level=level)
    if as_json:
        output.print_json(found)
        return
    rows = [(one.layer, one.feature, str(one.rise), one.q) for one in found if one.significant]
    title = "Activation at the last repeat of a token less that at its first occurrence"
    output.show(title, ("layer", "feature", "rise", "q"), rows, Table.of(title, found, ("layer", "feature", "rise")))
    if len(rows) < len(found):
        out = f"{len(found) - len(rows)} of the {len(found)} features that rise most do not pass"
        output.console().print(f"{out} a false discovery rate of {level:g} and are left out.")


def print_top_logits(
    scope: Callable[[], Scope],
    words: str,
    layers: list[int] | None,
    n: int,
    lens: str | os.PathLike[str] | None,
    as_json: bool,
) -> None:
    """Features that promote words directly, or through a lens beside that."""
    from qwen_scope.features import lens_logits, load_lens, token_ids, top_logits

    through = None if lens is None else load_lens(lens)
    opened = scope()
    tokens = token_ids(opened, words.split())
    if through is not None:
        read = lens_logits(opened, through, tokens, layers, n)
        rows = [(one.layer, one.feature, one.score, one.direct, f"{one.beaten:.1%}") for one in read]
        columns = ("layer", "feature", "through the lens, sd", "directly, sd", "random below")
        if as_json:
            output.print_json(read)
        else:
            output.show(f"Features that dispose the model to say {words}", columns, rows)
        return
    found = top_logits(opened, tokens, layers, n)
    if as_json:
        output.print_json(found)
        return
    rows = [(one.layer, one.feature, one.score) for one in found]
    output.show(f"Features that promote {words}", ("layer", "feature", "standard deviations"), rows)


def print_near(spec: str, store: FeatureStore | None, scope: Scope | None, n: int, as_json: bool) -> None:
    from qwen_scope.features import cofiring, elsewhere, similar
    from qwen_scope.sae import parse_feature

    place = parse_feature(spec)
    found = {"similar": similar(scope, *place, n)} if scope is not None else {}
    if store is not None:
        found["cofiring"] = cofiring(store, *place, n)
    layers = store.layers if store is not None else scope.layers if scope is not None else []
    found["elsewhere"] = elsewhere(*place, layers, scope=scope, store=store)
    if as_json:
        output.print_json(found)
        return
    for name, some in found.items():
        rows = [(one.layer, one.feature, one.cosine, one.jaccard) for one in some]
        output.show(name, ("layer", "feature", "cosine", "Jaccard"), rows)


def print_labels(store: FeatureStore, words: str, n: int, as_json: bool) -> None:
    from qwen_scope.features import Notes, label_text

    found = Notes(store).search(words, n)
    if as_json:
        output.print_json([note.to_json() for note in found])
        return
    rows = [
        (note.layer, note.feature, label_text(note.label) if note.kind == "label" else note.body["text"])
        for note in found
    ]
    output.show(f"Labels and notes with {words}", ("layer", "feature", "name or note"), rows)


def need(store: FeatureStore | None, option: str) -> FeatureStore:
    if store is None:
        raise InputError(f"{option} looks in a store; name its folder first: qwen-scope find STORE {option} ...")
    return store

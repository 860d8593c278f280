"""`qwen-scope label`: names for features, never without their scores; and the notes of a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.errors import InputError
from qwen_scope.features import JudgeOptions, LabelOptions
from qwen_scope.scope import ScopeOptions

from . import options, output
from .groups import OPTIONS, grouped
from .show import scope_of
from .store import the_layer

if TYPE_CHECKING:
    from qwen_scope.store import FeatureStore


OPTIONS[LabelOptions] = {
    "examples": Annotated[int, typer.Option("--examples", help="Contexts a name is made from.", min=2)],
    "tests": Annotated[int, typer.Option("--tests", help="Contexts of each kind a name is tested on.", min=4)],
    "seed": Annotated[int, typer.Option("--seed", help="Of the contexts.", **options.SEED)],
}
OPTIONS[JudgeOptions] = {
    "summary": Annotated[bool, typer.Option("--summary", help="No model: name by rule what a feature fires on.")],
    "judge": Annotated[str | None, typer.Option("--judge", help="The model to ask. Default: OPENAI_MODEL.")],
    "max_requests": Annotated[int | None, typer.Option("--max-requests", help="Stop after this many requests.", min=1)],
    "max_tokens": Annotated[int | None, typer.Option("--max-tokens", help="Stop after this many tokens.", min=1)],
    "concurrency": Annotated[int, typer.Option("--concurrency", help="Requests at a time.", min=1)],
    "cache": Annotated[
        Path | None, typer.Option("--cache", help="Where answers are kept. Default: beside the store, STORE.cache.")
    ],
}

MERGE = "Add those of an exported file, or Neuronpedia's label batches: batch-N.jsonl.gz or a folder with some."


@grouped
def label(
    folder: Annotated[Path, typer.Argument(metavar="STORE", help="A store that extract has written.")],
    judge: JudgeOptions,
    how: LabelOptions,
    layer: Annotated[int | None, typer.Option("--layer", help="Of -n. Default: the only one.")] = None,
    features: Annotated[
        str | None, typer.Option("--features", "--feature", "-f", help="Which: LAYER/FEATURE, as in 2/3,2/40-50.")
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="This many of the most frequent features.", min=1)] = None,
    lens: Annotated[
        Path | None,
        typer.Option("--lens", help="A Jacobian lens of the store's model (lens fit): names say what comes next."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also features that have a label of this judge.")] = False,
    note: Annotated[str | None, typer.Option("--note", help="Write a note on one feature instead.")] = None,
    author: Annotated[str, typer.Option("--author", help="Of the note.")] = "",
    verdict: Annotated[
        Path | None, typer.Option("--verdict", help="Keep what 'validate --json' printed with one feature.")
    ] = None,
    export: Annotated[Path | None, typer.Option("--export", help="Write all labels, notes and verdicts here.")] = None,
    merge: Annotated[Path | None, typer.Option("--merge", help=MERGE)] = None,
    as_json: options.Json = False,
) -> None:
    """Name features of a store and score the names on contexts they were not made from.

    The judge is any OpenAI-compatible endpoint: OPENAI_BASE_URL, OPENAI_MODEL and OPENAI_API_KEY. Without one, or with
    --summary, rules say what script, language, kind or place a feature fires on, which tokens, or that they can't. With
    --lens names are made knowing what a feature makes likely next. A run that was stopped goes on.
    """
    from qwen_scope.features import (
        ModelJudge,
        Notes,
        import_explanations,
        is_explanations,
        judge_of,
        label_features,
        load_lens,
        words_by_lens,
    )
    from qwen_scope.files import check_output
    from qwen_scope.store import FeatureStore

    if export is not None:
        check_output(export, folder, *([merge] if merge else []))
    store = FeatureStore(folder)
    if export is not None or merge is not None:
        notes = Notes(store)
        if merge is not None and is_explanations(merge):
            added = import_explanations(store, merge)
        else:
            added = notes.merge(merge) if merge is not None else 0
        written = notes.export(export) if export is not None else 0
        output.print_json({"merged": added, "exported": written, "kept": len(notes)})
        return
    if note is not None or verdict is not None:
        keep(store, *one_feature(store, layer, features), note, verdict, author)
        return
    chosen = which(store, layer, features, n)
    output.hold(folder)
    asked = judge_of(store, judge)
    promotes = None if lens is None else words_by_lens(scope_of(store, None, ScopeOptions()), load_lens(lens))
    with output.progress() as bar:
        found = label_features(store, chosen, asked, how, again=again, promotes=promotes, progress=bar)
    print_labelled(found, len(chosen), as_json)
    if isinstance(asked, ModelJudge) and not as_json:
        spent = asked.endpoint.spent
        bad = f", {spent.unusable} answers of no use" if spent.unusable else ""
        cached = f"{spent.cached} answers from the cache{bad}"
        output.console().print(f"{spent.requests} requests, {spent.tokens:,} tokens, {cached}")
    if (reasons := [one for one in found.values() if isinstance(one, str)]) and len(reasons) == len(chosen):
        raise InputError(f"none of the {len(found)} features got a label: {reasons[0]}")


def which(store: FeatureStore, layer: int | None, features: str | None, n: int | None) -> list[tuple[int, int]]:
    """Layer and feature of those that were named, or of the most frequent ones."""
    from qwen_scope.features import most_frequent
    from qwen_scope.sae import features_at

    if (features is None) == (n is None):
        raise InputError("say which features: --features 2/3,2/40-50, or -n for the most frequent ones")
    if features is not None:
        return features_at(features, store.layers, layer)
    layer = the_layer(store, layer)
    return [(layer, feature) for feature in most_frequent(store, layer, n or 1)]


def one_feature(store: FeatureStore, layer: int | None, features: str | None) -> tuple[int, int]:
    """The one feature that was named."""
    from qwen_scope.sae import features_at

    found = features_at(features, store.layers, layer) if features is not None else []
    if len(found) != 1:
        raise InputError("name one feature with --feature LAYER/FEATURE")
    return found[0]


def keep(store: FeatureStore, layer: int, feature: int, note: str | None, verdict: Path | None, author: str) -> None:
    """Add a note or a verdict."""
    from qwen_scope.features import Notes
    from qwen_scope.files import read_object

    store.check_feature(layer, feature)
    notes = Notes(store)
    if verdict is not None:
        found = read_object(verdict, "write it with qwen-scope validate --json")
        if "outcome" not in found:
            raise InputError(f"{verdict} holds no verdict: write it with qwen-scope validate --json")
        notes.verdict(layer, feature, found, author)
    if note is not None:
        notes.write(layer, feature, options.typed(note), author)
    output.print_json([entry.to_json() for entry in notes.of(layer, feature)])


def print_labelled(found: dict, wanted: int, as_json: bool) -> None:
    """The labels, each with its scores, and why others have none."""
    from qwen_scope.sae import feature_name

    labelled = {place: one for place, one in found.items() if not isinstance(one, str)}
    failed = {place: one for place, one in found.items() if isinstance(one, str)}
    left = wanted - len(found)
    if as_json:
        rows = [
            {"layer": place[0], "feature": place[1], "label": one, "at_chance": one.at_chance}
            for place, one in labelled.items()
        ]
        without = [{"layer": place[0], "feature": place[1], "reason": one} for place, one in failed.items()]
        output.print_json({"labels": rows, "without": without, "left_for_want_of_budget": left})
        return
    rows = [
        (feature_name(*place), str(one.detection), str(one.fuzzing), one.source, one.shown)
        for place, one in labelled.items()
    ]
    output.show("Labels", ("feature", "detection", "fuzzing", "by", "name"), rows)
    if chance := sum(one.at_chance for one in labelled.values()):
        output.console().print(
            f"{chance} of {len(labelled)} names are at chance: the interval of their detection reaches 0.5, so nothing"
            " says that they fit",
            soft_wrap=True,
        )
    if failed:
        output.show(
            "Without a label", ("feature", "reason"), [(feature_name(*place), one) for place, one in failed.items()]
        )
    if left:
        output.console().print(f"{left} features are left for want of budget; the same command goes on")

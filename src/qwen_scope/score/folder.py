"""What a scoreboard is made of: layers, arms, documents and labelled texts, and what its folder holds of it."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.files import read_lines, read_object
from qwen_scope.model import LoadedModel
from qwen_scope.sae import layers_of
from qwen_scope.text import Corpus, TokenRows

from .controls import ARMS, TRAINED
from .labelled import ColumnData, LabelledData, check_dataset
from .options import ScoreRun
from .probe_data import ProbeData
from .suites import SUITES

CONFIG, CELLS = "score.json", "cells.jsonl"
LABELLED_DOCUMENTS = 20_000  # of a corpus whose columns are labels


def layers_of_run(run: ScoreRun, source: str) -> list[int]:
    """The layers that were asked for, or all.   Raises NotFoundError: the SAEs have no such layer."""
    there = layers_of(source)
    if bad := [layer for layer in run.layers or () if layer not in there]:
        raise NotFoundError(f"{source} has no layer {bad[0]}; it has layers {', '.join(map(str, there))}")
    return sorted(run.layers or there)


def arms_of(run: ScoreRun) -> tuple[str, ...]:
    """The SAE, and the controls if they were asked for."""
    return ARMS if run.controls else (TRAINED,)


def wanted(run: ScoreRun, layers: list[int]) -> list[tuple[int, str]]:
    """Every layer with every arm, in the order in which they are measured."""
    return [(layer, arm) for layer in layers for arm in arms_of(run)]


def saved(run: ScoreRun, layer: int, arm: str) -> Path:
    """Where a control is kept."""
    return run.out / "controls" / arm.replace(" ", "-") / f"layer{layer}"


def kept(run: ScoreRun) -> dict[tuple[int, str], Any]:
    """The figures that the folder holds, by layer and arm.

    Raises:
        MismatchError: they are of another run.
    """
    known, mine = read_object(run.out / CONFIG), json.loads(json.dumps(run.to_json()))
    if other := [name for name in mine if known.get(name) != mine[name]]:
        raise MismatchError(
            f"{run.out} holds a scoreboard with {other[0]} {known.get(other[0])!r:.80}, not {mine[other[0]]!r:.80};"
            " name another folder with out="
        )
    return {(one["layer"], one["arm"]): one for one in map(json.loads, read_lines(run.out / CELLS))}


def suites_of(
    run: ScoreRun, data: LabelledData | None, layers: list[int]
) -> dict[str, tuple[dict[tuple[int, str, str], Any], list[str], list[tuple[int, str]]]]:
    """By suite what the folder holds by layer, item and arm, the items, and the layers and items that are left."""
    out = {}
    for suite in run.suites or SUITES:
        items = SUITES[suite].items(run, data)
        lines = map(json.loads, read_lines(run.out / f"{suite}.jsonl"))
        known = {(one["layer"], one["item"], one["arm"]): one for one in lines}
        pairs = [(layer, item) for layer in layers for item in items]
        left = [(layer, item) for layer, item in pairs if any((layer, item, arm) not in known for arm in arms_of(run))]
        if items:
            out[suite] = (known, items, left)
    return out


def labelled_data(run: ScoreRun) -> LabelledData | None:
    """Where labelled texts come from, if anywhere.   Raises NotFoundError: a dataset that is not there."""
    data: LabelledData | None = ProbeData(run.probes) if run.probes else None
    if run.columns:
        corpus = Corpus.of(run.data, run.corpus, shuffle=0, quiet=True)
        data = ColumnData(islice(corpus, LABELLED_DOCUMENTS), run.columns)
    for name in run.datasets or () if data else ():
        check_dataset(data, name)  # pyright: ignore[reportArgumentType]
    return data


def documents(run: ScoreRun, shuffle: int = 0, **share: bool) -> Corpus:
    """Shuffled and cut, as SAEs are trained: a few thousand tokens in the order of the files would be one source's."""
    return Corpus.of(run.data, run.corpus, hold_out=run.hold_out, shuffle=shuffle, longest=run.longest, **share)


def held_out(run: ScoreRun, loaded: LoadedModel) -> list[Tensor]:
    """Rows of the documents that no control is trained on."""
    corpus = documents(run, held_out=True)
    rows = TokenRows(corpus, loaded.tokenizer, context_length=run.context_length, batch_size=run.batch_size)
    found = rows.take(run.tokens)
    if not found:
        raise InputError(
            f"the held-out text of {corpus.name} does not fill one row of {run.context_length} tokens; lower"
            " context_length or hold_out"
        )
    return found

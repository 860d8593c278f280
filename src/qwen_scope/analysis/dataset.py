"""`Dataset`: the `Firing` table of one set of documents at one layer, as arrays; and the scores of models on it."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from jaxtyping import Float32, Float64, Int, Int32

from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError
from qwen_scope.store import FeatureStore


@final
@dataclass(frozen=True, eq=False)
class Scores:
    """What models scored on the items of a dataset.

    Attributes:
        models: their names.
        values: `(items, models)`, higher is better; usually 0 or 1 per item.
    """

    models: tuple[str, ...]
    values: Float64[np.ndarray, "items models"]


@final
@dataclass(frozen=True, eq=False)
class Dataset:
    """Which features fire on which items, at one layer, under one reduction over their tokens.

    Attributes:
        name: what tables call it.
        ids: one per item; an item counts also where no feature fires.
        layer, width: of the SAE.   sae: its fingerprint.
        item, feature, value, position: one row per (item, feature) that fires, by item, then feature. `position` is
            the token of that value, or -1.
        reduction: `any`, `last`, `mean` or `max`, as in `FeatureStore.firing`.
        scores: of a panel of models on the items, where there are any.
        texts: of the items, where they are known; only examples show them.
        labels: what features are called, where they have a label.

    Raises:
        InputError: no item, an id that occurs twice, rows that do not fit or occur twice.
    """

    name: str
    ids: tuple[str, ...]
    layer: int
    width: int
    sae: str
    item: Int32[np.ndarray, " rows"]
    feature: Int32[np.ndarray, " rows"]
    value: Float32[np.ndarray, " rows"]
    position: Int32[np.ndarray, " rows"]
    reduction: str = "max"
    scores: Scores | None = None
    texts: tuple[str, ...] | None = field(default=None, repr=False)
    labels: Mapping[int, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.ids:
            raise InputError(f"{self.name} is empty: an analysis needs at least one item")
        check_ids(self.name, self.ids)
        if len(self.item):
            inside = self.item.min() >= 0 and self.item.max() < len(self.ids)
            if not (inside and self.feature.min() >= 0 and self.feature.max() < self.width):
                raise InputError(f"{self.name} has firings of items or features that it does not have")
            place = self.item.astype(np.int64) * self.width + self.feature
            if (np.diff(place) <= 0).any():
                raise InputError(f"the firings of {self.name} are not in order, or one of them occurs twice")
        if self.scores is not None and self.scores.values.shape != (len(self.ids), len(self.scores.models)):
            raise InputError(f"the scores of {self.name} are not one row per item and one column per model")

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def from_table(
        cls, table: Any, *, name: str, ids: Sequence[str], layer: int, width: int, sae: str, **more: Any
    ) -> Dataset:
        """The rows of one layer of a `Firing` table (an Arrow table), whose documents are the items in order."""
        columns = {c: table[c].to_numpy() for c in ("document", "layer", "feature", "value", "position")}
        here = columns["layer"] == layer
        item, feature = columns["document"][here].astype(np.int32), columns["feature"][here].astype(np.int32)
        order = np.lexsort((feature, item))
        return cls(
            name,
            tuple(ids),
            layer,
            width,
            sae,
            item[order],
            feature[order],
            columns["value"][here].astype(np.float32)[order],
            columns["position"][here].astype(np.int32)[order],
            **more,
        )

    @classmethod
    def from_store(
        cls,
        store: FeatureStore,
        layer: int,
        reduction: Literal["any", "last", "mean", "max"] = "max",
        *,
        name: str | None = None,
        scores: str | os.PathLike[str] | None = None,
        texts: bool = False,
        phases: Sequence[str] | None = None,
    ) -> Dataset:
        """The documents of a store. Their ids are the `id` of their metadata where all have one, else their numbers.

        Args:
            scores: a table of scores, as `read_scores` takes it.
            texts: also keep the text of every document.
            phases: only what fires in these phases of a conversation.

        Raises:
            NotFoundError: the store has no such layer, or tells no phases.
            InputError: as for the class, or an unknown reduction or phase.
        """
        info, ids = store.layer(layer), store_ids(store)
        name = name or store.folder.name
        check_ids(name, ids)
        return cls.from_table(
            store.firing(reduction, [layer], phases=phases),
            name=name,
            ids=ids,
            layer=layer,
            width=info.d_sae,
            sae=info.fingerprint,
            reduction=reduction,
            scores=None if scores is None else read_scores(scores, ids),
            texts=store_texts(store) if texts else None,
        )

    def take(self, items: Sequence[int] | Int[np.ndarray, " some"], name: str | None = None) -> Dataset:
        """Some of the items, in the order given."""
        chosen = np.asarray(items, dtype=np.int64)
        start = np.searchsorted(self.item, np.arange(len(self.ids) + 1))
        lengths = (start[1:] - start[:-1])[chosen]
        shift = np.repeat(start[:-1][chosen] - np.cumsum(lengths) + lengths, lengths)
        rows = np.arange(int(lengths.sum())) + shift
        return Dataset(
            name or self.name,
            tuple(self.ids[i] for i in chosen),
            self.layer,
            self.width,
            self.sae,
            np.repeat(np.arange(len(chosen), dtype=np.int32), lengths),
            self.feature[rows],
            self.value[rows],
            self.position[rows],
            self.reduction,
            None if self.scores is None else Scores(self.scores.models, self.scores.values[chosen]),
            None if self.texts is None else tuple(self.texts[i] for i in chosen),
            self.labels,
        )

    def counts(self) -> Int[np.ndarray, " width"]:
        """Per feature, on how many items it fires."""
        return np.bincount(self.feature, minlength=self.width)

    def rates(self) -> Float64[np.ndarray, " width"]:
        """Per feature, on which share of the items it fires."""
        return self.counts() / len(self.ids)

    def matrix(self, values: bool = False) -> Any:
        """`(items, width)` as a SciPy sparse array: 1 where a feature fires, or its value."""
        from scipy.sparse import csr_array

        start = np.searchsorted(self.item, np.arange(len(self.ids) + 1))
        data = self.value if values else np.ones(len(self.item), np.float32)
        return csr_array((data, self.feature, start), shape=(len(self.ids), self.width))


def check_together(datasets: Sequence[Dataset], at_least: int = 1, scores: bool = False) -> None:
    """Raise unless the datasets may stand in one analysis.

    Raises:
        InputError: too few, one name twice, or `scores` are needed and missing.
        MismatchError: firings of different SAEs or under different reductions, or scores of different models.
    """
    if len(datasets) < at_least:
        raise InputError(f"this analysis needs at least {at_least} datasets, not {len(datasets)}")
    names = [d.name for d in datasets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two datasets are called {twice[0]!r}; give each a name of its own with --names")
    first = datasets[0]
    for other in datasets[1:]:
        if (other.sae, other.layer, other.width) != (first.sae, first.layer, first.width):
            raise MismatchError(
                f"{first.name} and {other.name} were made with different SAEs ({first.sae[:12]} of layer {first.layer},"
                f" {other.sae[:12]} of layer {other.layer}); extract both with the same one"
            )
        if other.reduction != first.reduction:
            raise MismatchError(f"{first.name} is reduced by {first.reduction!r} and {other.name} by another way")
    scored = [d for d in datasets if d.scores is not None]
    if scores and len(scored) < len(datasets):
        missing = next(d.name for d in datasets if d.scores is None)
        raise InputError(f"there are no scores for {missing}; give one table per dataset with --scores")
    for other in scored[1:]:
        a, b = scored[0].scores, other.scores
        if a and b and a.models != b.models:
            odd = sorted(set(a.models) ^ set(b.models)) or ["the order of the models"]
            raise MismatchError(f"the scores of {scored[0].name} and {other.name} differ in {', '.join(odd[:3])}")


def read_scores(path: str | os.PathLike[str], ids: Sequence[str]) -> Scores:
    """A table of scores for the items with these ids: a CSV with the columns `id` and one per model.

    Raises:
        NotFoundError: there is no such file.   FormatError: it is no such table, or a cell is not a number.
        InputError: an item has no row, or two; a model lacks a score.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise NotFoundError(f"there is no table of scores {str(path)!r} that can be read") from error
    if not rows or len(rows[0]) < 2 or rows[0][0] != "id":
        raise FormatError(f"{path} is no table of scores: its first line names the columns, 'id' and one per model")
    models, found = tuple(rows[0][1:]), {}
    if len(set(models)) < len(models):
        raise FormatError(f"{path} names a model twice")
    check_ids(str(path), [row[0] for row in rows[1:] if row])
    for row in rows[1:]:
        if not row:
            continue
        for model, cell in zip(models, [*row[1:], *[""] * (len(models) - len(row) + 1)], strict=False):
            if not cell.strip():
                raise InputError(f"{path} has no score of the model {model!r} on the item {row[0]!r}")
        try:
            values = [float(cell) for cell in row[1:]]
        except ValueError as error:
            raise FormatError(f"{path} has a score that is no number on the item {row[0]!r}") from error
        if len(values) != len(models) or not all(map(math.isfinite, values)):
            raise FormatError(f"{path} has a score that is not finite, or too many, on the item {row[0]!r}")
        found[row[0]] = values
    if absent := [i for i in ids if i not in found]:
        raise InputError(f"{path} has no scores for {len(absent)} of {len(ids)} items, such as {absent[0]!r}")
    return Scores(models, np.array([found[i] for i in ids], dtype=np.float64))


def check_ids(name: str, ids: Sequence[str]) -> None:
    """Raise InputError where an id occurs twice."""
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))
        raise InputError(f"{name} has the id {twice!r} twice; every item needs an id of its own")


def store_ids(store: FeatureStore) -> tuple[str, ...]:
    """The ids of the documents of a store."""
    metas = [json.loads(text) for text in store.sql("SELECT meta FROM documents ORDER BY document")["meta"].to_pylist()]
    if metas and all("id" in meta for meta in metas):
        return tuple(str(meta["id"]) for meta in metas)
    return tuple(str(i) for i in range(len(metas)))


def store_texts(store: FeatureStore) -> tuple[str, ...]:
    """The texts of the documents of a store, joined from their tokens."""
    query = "SELECT string_agg(text, '' ORDER BY position) AS text FROM tokens GROUP BY document ORDER BY document"
    return tuple(store.sql(query)["text"].to_pylist())

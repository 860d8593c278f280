"""A concept as the documents' metadata tell it, and how well a feature goes with it, beside another one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from qwen_scope.errors import InputError
from qwen_scope.features import auroc_of
from qwen_scope.stats import Interval, auroc, resample
from qwen_scope.store import FeatureStore

from .fade import purity, responsiveness

FEWEST = 8
"""Documents of either side that say anything."""
OTHERS = 32
"""Other values of the column that a concept is held against; of more, so many are drawn."""


@dataclass(frozen=True)
class Concept:
    """Documents whose metadata have a value in a column, such as language de."""

    column: str
    value: str

    def __str__(self) -> str:
        return f"{self.column}={self.value}"


@dataclass(frozen=True)
class ConceptFit:
    """How well a feature tells the documents of a concept from the others of a store.

    Attributes:
        concept, other: `column=value` of the concept, and of that other value of the column which the feature tells
            best: the control, for a wrong name is wrong where another one fits better.
        documents, others: how many have it, and have not.
        auroc: of the largest activation of each document.   auroc_of_other: the same for the other value, on the same
            documents; None where there is no other value on enough documents.
        responsiveness, purity: as FADE defines them, with the metadata in the place of a judge's ratings.
    """

    concept: str
    documents: int
    others: int
    auroc: Interval
    responsiveness: float
    purity: float
    other: str | None
    auroc_of_other: Interval | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ConceptFit:
        """What `to_json` wrote."""
        ends = {name: None if data[name] is None else Interval(**data[name]) for name in ("auroc", "auroc_of_other")}
        return cls(**{name: data[name] for name in cls.__dataclass_fields__} | ends)  # type: ignore[arg-type]


def concept_fit(store: FeatureStore, layer: int, feature: int, concept: Concept, seed: int = 0) -> ConceptFit:
    """Measure it on every document of the store that has a token.

    Raises:
        NotFoundError: no such column.   InputError: too few documents with or without the concept.
    """
    values = strongest(store, layer, feature)
    has = documents_with(store, concept)
    mine, rest = values[has], values[~has]
    if min(len(mine), len(rest)) < FEWEST:
        raise InputError(
            f"{len(mine)} documents of {store.folder} have {concept} and {len(rest)} have not; {FEWEST} of each are the"
            " least"
        )
    control = _best_other(store, concept, values, np.random.default_rng((seed, layer, feature)))
    return ConceptFit(
        str(concept), len(mine), len(rest), resample(mine, rest, auroc_of), responsiveness(mine, rest),
        purity(mine, rest), *(control or (None, None)),
    )  # fmt: skip


def strongest(store: FeatureStore, layer: int, feature: int) -> Float[np.ndarray, " documents"]:
    """The largest activation of a feature in each document, 0 where it is silent."""
    table = store.firing("max", [layer], features=[feature])
    out = np.zeros(store.manifest.documents)
    out[table["document"].to_numpy()] = table["value"].to_numpy()
    return out


def documents_with(store: FeatureStore, concept: Concept) -> np.ndarray:
    """Which documents have the concept, `(documents,)`."""
    out = np.zeros(store.manifest.documents, bool)
    out[store.where((concept.column, concept.value, True))] = True
    return out


def _best_other(
    store: FeatureStore, concept: Concept, values: Float[np.ndarray, " documents"], rng: np.random.Generator
) -> tuple[str, Interval] | None:
    """The other value of the column that a feature's activations tell best, and how well; None where there is none."""
    column = column_of(store, concept.column)
    best = None
    for value in rng.permutation(sorted({one for one in column if one not in (None, concept.value)}))[:OTHERS].tolist():
        has = np.array([one == value for one in column])
        if min(has.sum(), (~has).sum()) >= FEWEST:
            found = float(auroc(values[has], values[~has]))
            best = max(best or (found, value), (found, value))
    if best is None:
        return None
    has = np.array([one == best[1] for one in column])
    return f"{concept.column}={best[1]}", resample(values[has], values[~has], auroc_of)


def column_of(store: FeatureStore, column: str) -> list[str | None]:
    """What the metadata of each document say in a column, as it is typed behind `COLUMN=`; None where nothing."""
    metas = [json.loads(text) for text in store.sql("SELECT meta FROM documents ORDER BY document")["meta"].to_pylist()]
    found = [meta.get(column) for meta in metas]
    return [one if one is None or isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in found]


def token_ids_of(
    store: FeatureStore, documents: Int64[np.ndarray, " n"] | Sequence[int], tokens: int
) -> list[list[int]]:
    """The first `tokens` tokens of some documents."""
    places = store.tables["documents"].take(np.asarray(documents, np.int64), ["first_token", "tokens"])
    first, length = (column.to_pylist() for column in places.columns)
    return [
        store.tables["tokens"].read(at, min(n, tokens), ["token"])["token"].to_pylist()
        for at, n in zip(first, length, strict=True)
    ]

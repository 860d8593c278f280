"""Labelled texts: two classes, several classes, or two attributes of the same texts; and a corpus' columns as such."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol, final, runtime_checkable

import numpy as np
from jaxtyping import Int64

from qwen_scope.errors import NotFoundError, nearest
from qwen_scope.text import Document

CLASSES = 5  # of a set at most, as SAEBench has
Quadrants = Mapping[tuple[int, int], tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Labelled:
    """One dataset: texts, and for each 0 or 1, the labels in alphabetical order."""

    name: str
    texts: tuple[str, ...]
    y: Int64[np.ndarray, " n"]


@runtime_checkable
class LabelledData(Protocol):
    """Where labelled texts come from: `ProbeData` or `ColumnData`."""

    @property
    def names(self) -> list[str]:
        """Datasets of two classes."""
        ...

    @property
    def sets(self) -> list[str]:
        """Sets of at least three classes."""
        ...

    @property
    def pairs(self) -> list[str]:
        """Pairs of attributes that texts have."""
        ...

    def read(self, name: str) -> Labelled:
        """One dataset of two classes.   Raises NotFoundError: there is none of that name."""
        ...

    def classes(self, name: str) -> Mapping[str, tuple[str, ...]]:
        """The texts of each class of a set."""
        ...

    def crossed(self, name: str) -> Quadrants:
        """The texts of a pair by both attributes, each 1 or 0."""
        ...


def check_dataset(data: LabelledData, name: str) -> None:
    """Raise NotFoundError unless there is a dataset of two classes with that name."""
    if name not in data.names:
        raise NotFoundError(f"{data} has no dataset {name!r}; {nearest(name, data.names)}")


def halves(one: Labelled) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The texts of class 0 and of class 1."""
    return tuple(t for t, y in zip(one.texts, one.y, strict=True) if y == 0), tuple(
        t for t, y in zip(one.texts, one.y, strict=True) if y == 1
    )


def quadrants(a: Labelled, b: Labelled) -> Quadrants:
    """Texts that two datasets have in common, by both labels, in the order of the first."""
    other = dict(zip(b.texts, b.y.tolist(), strict=True))
    found: dict[tuple[int, int], list[str]] = {(i, j): [] for i in (1, 0) for j in (1, 0)}
    for text, y in dict(zip(a.texts, a.y.tolist(), strict=True)).items():
        if text in other:
            found[y, other[text]].append(text)
    return {which: tuple(texts) for which, texts in found.items()}


@final
class ColumnData:
    """The columns of a corpus as labels: a value against all others, the values of a column, two values of two columns.

    Args:
        documents: with their columns.   columns: which of them are labels.

    Raises:
        NotFoundError: a column that no document has.
    """

    def __init__(self, documents: Iterable[Document], columns: Sequence[str]) -> None:
        self._rows = [(d.plain, {c: d.meta.get(c) for c in columns}) for d in documents]
        self.columns = tuple(columns)
        self._values = {c: self._most_common(c) for c in columns}
        for column, values in self._values.items():
            if not values:
                raise NotFoundError(f"no document that was read has a column {column!r}")

    def __str__(self) -> str:
        return f"the columns {', '.join(self.columns)}"

    @property
    def names(self) -> list[str]:
        """Such as `language=de`: that value of a column against its others."""
        return [f"{column}={value}" for column, values in self._values.items() for value in values if len(values) > 1]

    @property
    def sets(self) -> list[str]:
        return [column for column, values in self._values.items() if len(values) > 2]

    @property
    def pairs(self) -> list[str]:
        """Such as `language=de|fr x register=plain|rude`, of the two commonest values of each."""
        sides = [f"{c}={values[0]}|{values[1]}" for c, values in self._values.items() if len(values) > 1]
        return [f"{a} x {b}" for a, b in combinations(sides, 2)]

    def read(self, name: str) -> Labelled:
        check_dataset(self, name)
        column, _, value = name.partition("=")
        rows = [(text, str(meta[column])) for text, meta in self._rows if meta[column] is not None]
        y = np.array([found == value for _, found in rows], dtype=np.int64)
        return Labelled(name, tuple(text for text, _ in rows), y)

    def classes(self, name: str) -> Mapping[str, tuple[str, ...]]:
        return {value: self._texts({name: value}) for value in self._values[name]}

    def crossed(self, name: str) -> Quadrants:
        (a, firsts), (b, seconds) = (
            (column, values.split("|")) for side in name.split(" x ") for column, _, values in (side.partition("="),)
        )
        return {(i, j): self._texts({a: firsts[1 - i], b: seconds[1 - j]}) for i in (1, 0) for j in (1, 0)}

    def _texts(self, wanted: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(
            text for text, meta in self._rows if all(str(meta[column]) == value for column, value in wanted.items())
        )

    def _most_common(self, column: str) -> list[str]:
        counts = Counter(str(meta[column]) for _, meta in self._rows if meta[column] is not None)
        return [value for value, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:CLASSES]]

"""`Result`: what an analysis found, as plain data that any command can print, draw and save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_scope.report import Figure

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A heading, the names of the columns, and rows."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Result:
    """What an analysis found.

    Attributes:
        data: every figure, as JSON knows it.
        tables, figures: the same for people.
        notes: sentences a reader must see, such as a warning about leakage.
    """

    data: dict[str, Any]
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = field(default=())

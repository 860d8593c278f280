"""`Result`: what an analysis found, as plain data that any command can print, draw and save."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwen_scope.report import Figure, Table


@dataclass(frozen=True)
class Result:
    """What an analysis found.

    Attributes:
        data: every figure, as JSON knows it.
        tables, figures: the same for people.
        notes: sentences a reader must see, such as a warning about leakage.
        verdict: what it comes to, in one sentence that stands before the tables.
        items: a row per item of the datasets, for a file; None where the analysis says nothing of single items.
    """

    data: dict[str, Any]
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = field(default=())
    verdict: str = ""
    items: Table | None = None

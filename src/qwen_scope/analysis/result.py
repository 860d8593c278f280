"""`Result`: what an analysis found, as plain data that any command can print, draw and save."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwen_scope.report import Figure, HasFrames, Table, element, join, styled


@dataclass(frozen=True, repr=False)
class Result(HasFrames):
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

    def sheet(self) -> Table:
        """The items where the analysis says something of each, else its first table."""
        return self.items or next(iter(self.tables), Table(self.verdict, (), ()))

    def __repr__(self) -> str:
        return f"Result({(self.verdict or self.sheet().title)[:80]!r}, {len(self.tables)} tables)"

    def _repr_html_(self) -> str:
        """What it comes to, every table, and what a reader must see."""
        verdict = element("p", element("b", self.verdict)) if self.verdict else None
        notes = [element("p", note, class_="place") for note in self.notes]
        return styled(join(verdict, *(table.to_html() for table in self.tables), *notes))

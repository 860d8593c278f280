"""`Table`: a heading, columns and rows as plain data, and the frames and files that people keep them in."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol, final

from rich.text import Text

from qwen_scope.errors import InputError, need, printable

from .markup import Markup, element, join
from .page import html_table, styled

if TYPE_CHECKING:
    import pyarrow as pa

Value = str | int | float | bool | None
KINDS = ("csv", "parquet", "json")
SHOWN = 100
"""Rows of a table that a notebook shows."""


class HasFrames:
    """What a table is the data of: every kind of frame comes from its `sheet`, in one way."""

    __slots__ = ()

    def sheet(self) -> Table:
        """All of it as one table, one row per thing."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return self.sheet()._repr_html_()

    def __repr__(self) -> str:
        table = self.sheet()
        return f"{type(self).__name__}({table.title[:SHOWN]!r}, {len(table.rows):,} rows)"

    def to_arrow(self) -> pa.Table:
        """Its `sheet` as an Arrow table."""
        return arrow(self.sheet())

    def to_pandas(self) -> Any:
        """Its `sheet` as a frame of pandas.

        Raises:
            NotFoundError: pandas is not installed.
        """
        need("to_pandas()", "pandas")
        return self.to_arrow().to_pandas()

    def to_polars(self) -> Any:
        """Its `sheet` as a frame of polars.

        Raises:
            NotFoundError: polars is not installed.
        """
        need("to_polars()", "polars")
        import polars

        return polars.from_arrow(self.to_arrow())


@final
@dataclass(frozen=True)
class Table(HasFrames):
    """A heading, the names of the columns, and rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @classmethod
    def of(cls, title: str, items: Iterable[Any], columns: Sequence[str] = ()) -> Table:
        """One row per dataclass or mapping, flat: an interval becomes `NAME`, `NAME_low` and `NAME_high`.

        Args:
            columns: of a table without a row.
        """
        rows = [flat(item) for item in items]
        names = list(dict.fromkeys(name for row in rows for name in row)) or list(columns)
        return cls(title, names, [[row.get(name) for name in names] for row in rows])

    def sheet(self) -> Table:
        return self

    def _repr_html_(self) -> str:
        return styled(self.to_html())

    def __repr__(self) -> str:
        return f"Table({self.title!r}, {len(self.rows):,} rows of {', '.join(self.columns)})"

    def to_html(self) -> Markup:
        """The first rows below the heading."""
        more = len(self.rows) - SHOWN
        note = element("p", f"and {more:,} rows more: to_pandas() has them all", class_="place") if more > 0 else None
        rows = [[shown(cell) for cell in row] for row in self.rows[:SHOWN]]
        return join(element("p", element("b", self.title)), html_table(self.columns, rows), note)


class Framed(Protocol):
    """Anything with a table of its own."""

    def sheet(self) -> Table: ...


def flat(item: Any, before: str = "") -> dict[str, Any]:
    """The fields of a dataclass or a mapping as columns; those of one in a field are named after both."""
    held = item if isinstance(item, Mapping) else {one.name: getattr(item, one.name) for one in fields(item)}
    row: dict[str, Any] = {}
    for key, value in held.items():
        name = f"{before}{key}"
        if is_dataclass(value) and not isinstance(value, type):
            inner = flat(value, f"{name}_")
            if {f"{name}_{end}" for end in ("estimate", "low", "high")} <= set(inner):
                inner = {name: inner[f"{name}_estimate"], f"{name}_low": inner[f"{name}_low"],
                         f"{name}_high": inner[f"{name}_high"]}  # fmt: skip
            row |= inner
        else:
            row[name] = value
    return row


def data_of(cell: Any) -> Value:
    """A cell as a frame keeps it: numbers as numbers, styled text as text, anything nested as JSON."""
    if isinstance(cell, Text):
        return cell.plain
    if hasattr(cell, "tolist"):
        cell = cell.tolist()
    if cell is None or isinstance(cell, str | bool | int | float):
        return cell
    return json.dumps(cell, ensure_ascii=False, default=str)


def shown(cell: Any) -> str | int | float | None:
    """A cell as a page shows it."""
    value = data_of(cell)
    return printable(value) if isinstance(value, str) else value


def arrow(table: Table) -> pa.Table:
    """A table of Arrow; a column whose values are of several kinds is text. Names that occur twice are numbered."""
    import pyarrow as pa

    names: list[str] = []
    for name in table.columns:
        names.append(name if name not in names else f"{name}_{sum(one.startswith(name) for one in names) + 1}")
    columns = []
    for i in range(len(names)):
        values = [data_of(row[i]) for row in table.rows]
        kinds = {type(value) for value in values if value is not None}
        if kinds == {int, float}:
            values = [None if value is None else float(value) for value in values]
        elif len(kinds) > 1:
            values = [None if value is None else str(value) for value in values]
        columns.append(pa.array(values))
    return pa.table(columns, names=names)


def joined(tables: Sequence[Table]) -> list[Table]:
    """Tables with the same columns below each other; where their titles differ, a first column `table` tells them
    apart."""
    groups: dict[tuple[str, ...], list[Table]] = {}
    for table in tables:
        groups.setdefault(tuple(table.columns), []).append(table)
    out = []
    for columns, some in groups.items():
        if len({one.title for one in some}) == 1:
            out.append(Table(some[0].title, columns, [row for one in some for row in one.rows]))
        else:
            rows = [(one.title, *row) for one in some for row in one.rows]
            out.append(Table(some[0].title, ("table", *columns), rows))
    return out


def file_of(table: Table, kind: str) -> bytes:
    """A table as the bytes of a file: `csv`, `parquet`, or `json` (a list of objects).

    Raises:
        InputError: another kind.
    """
    if kind not in KINDS:
        raise InputError(f"a table is written as one of {', '.join(KINDS)}, not {kind!r}")
    if kind == "parquet":
        import pyarrow.parquet as pq

        held = io.BytesIO()
        pq.write_table(arrow(table), held)
        return held.getvalue()
    rows = [[data_of(cell) for cell in row] for row in table.rows]
    if kind == "json":
        rows = [[None if isinstance(c, float) and not math.isfinite(c) else c for c in row] for row in rows]
        objects = [dict(zip(table.columns, row, strict=True)) for row in rows]
        return (json.dumps(objects, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "replace")
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "replace")

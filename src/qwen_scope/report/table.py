"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from .tokens import inert

Cell = str | int | float | None | Text


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Table:
    """A table with numbers to the right and text to the left; text is never read as markup, its control codes and ends
    of lines are escaped.

    The last column folds where the terminal is too narrow; the others stay whole, so that a name can be copied.
    """
    rows = [tuple(row) for row in rows]
    out = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold dim")
    for i, name in enumerate(columns):
        numeric = all(row[i] is None or isinstance(row[i], int | float) for row in rows)
        side = "right" if numeric else "left"
        out.add_column(inert(name), justify=side, overflow="fold", no_wrap=i < len(columns) - 1)
    for row in rows:
        out.add_row(*(cell_text(cell) for cell in row))
    return out


def cell_text(cell: Cell) -> Text:
    """One cell: floats to four significant digits, None as nothing."""
    if isinstance(cell, Text):
        return inert(cell)
    if cell is None:
        return Text("")
    if isinstance(cell, float):
        return Text(f"{cell:.4g}")
    return inert(str(cell))


def size(n_bytes: float) -> str:
    """Bytes as people say them, in powers of 1,000: `2.15 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n_bytes) < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"

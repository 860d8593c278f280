"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from .tokens import inert

Cell = str | int | float | None | Text


GAP = 2  # spaces between columns
SHORT = 12  # columns below which a text without spaces is not folded


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], width: int | None = None) -> Table:
    """A table with numbers to the right and text to the left; text is never read as markup, its control codes and ends
    of lines are escaped.

    Where `width` columns are too few, text wraps between words, in the last column also within them, as does a word
    that no line holds. A number or a name in another column stays whole, so that it can be read and copied, even if
    the table is then wider: `min_width` of the table says how wide it is.
    """
    rows = [tuple(row) for row in rows]
    cells = [[cell_text(cell) for cell in row] for row in rows]
    numeric = [all(row[i] is None or isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
    widths = column_widths(columns, cells, numeric, width)
    out = Table(
        box=None,
        padding=(0, GAP, 0, 0),
        pad_edge=False,
        header_style="bold dim",
        min_width=None if width is None else sum(widths) + GAP * max(0, len(widths) - 1),
    )
    for i, (name, number, wide) in enumerate(zip(columns, numeric, widths, strict=True)):
        side, whole = "right" if number else "left", i < len(columns) - 1
        if width is None:  # whoever prints it finds out how wide it may be
            out.add_column(inert(name), justify=side, overflow="fold", no_wrap=whole)
        else:
            out.add_column(inert(name), justify=side, overflow="fold", width=wide)
    for row in cells:
        out.add_row(*row)
    return out


def column_widths(
    columns: Sequence[str], cells: Sequence[Sequence[Text]], numeric: Sequence[bool], width: int | None
) -> list[int]:
    """How wide each column is: as its longest cell, or, to fit into `width`, the widest ones down to their words."""
    texts = [[name, *(row[i].plain for row in cells)] for i, name in enumerate(columns)]
    wide = [max(cell_len(line) for text in some for line in text.split("\n")) for some in texts]
    words = [max(cell_len(word) for text in some for word in (text.split() or [""])) for some in texts]
    least = [one if number else word for one, word, number in zip(wide, words, numeric, strict=True)]
    for i, word in enumerate(least):
        if not numeric[i] and (i == len(least) - 1 or (width is not None and word > width)):
            least[i] = min(word, SHORT)
    while width is not None and sum(wide) + GAP * (len(wide) - 1) > width:
        room = [(one, i) for i, one in enumerate(wide) if one > least[i]]
        if not room:
            break
        wide[max(room)[1]] -= 1
    return wide


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

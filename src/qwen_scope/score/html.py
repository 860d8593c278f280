"""A scoreboard as one HTML file."""

from __future__ import annotations

from qwen_scope.errors import printable
from qwen_scope.report import element, html_page, html_table

from .controls import TRAINED
from .scoreboard import WITH, WITHOUT, Scoreboard


def scoreboard_html(board: Scoreboard) -> str:
    """A self-contained document: it opens from a folder, runs no script and asks nothing of the network."""
    parts = [
        element("h1", f"Scoreboard of {printable(board.run.sae)}"),
        element("p", f"on {printable(board.run.model)}, text {printable(board.run.data)}", class_="place"),
    ]
    for layer in board.cells:
        for sinks in (WITHOUT, WITH):
            columns, rows = score_table(board, layer, sinks)
            parts += [element("h2", f"Layer {layer}, {sinks}"), html_table(columns, rows)]
        if board.probes:
            parts += [element("h2", f"Layer {layer}, {PROBING}"), html_table(*probe_table(board, layer))]
    weak = board.not_better()
    said = "; ".join(f"layer {layer}, {sinks}: {figure} by {arm}" for layer, arm, sinks, figure in weak)
    if any(arm != TRAINED for arms in board.cells.values() for arm in arms):
        parts.append(element("p", f"A control does as well or better: {said}." if weak else "No control does as well."))
    return html_page(f"Scoreboard of {board.run.sae}", *parts)


Cell = str | float
PROBING = "sparse probing: mean AUROC by number of features"


def probe_table(board: Scoreboard, layer: int) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
    """Sparse probing of one layer: the mean over datasets, and of the residual that it is read against."""
    return _table("features", board.probe_rows(layer), [arm for arm in board.cells[layer] if arm != TRAINED])


def score_table(board: Scoreboard, layer: int, sinks: str) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
    """The figures of one layer: the SAE's, then each control's with the gain over it."""
    arms = [arm for arm in board.cells[layer] if arm != TRAINED]
    return _table("figure", board.rows(layer, sinks), arms)


def _table(
    first: str, found: list[tuple[str, float, list[tuple[str, float, float]]]], arms: list[str]
) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
    columns = (first, TRAINED, *(name for arm in arms for name in (arm, "gain")))
    rows: list[tuple[Cell, ...]] = []
    for name, own, others in found:
        cells: list[Cell] = [name, own]
        for _, value, gain in others:
            # NaN: there is none, or neither more nor less is better.
            cells += ["" if one != one else one for one in (value, gain)]
        rows.append(tuple(cells))
    return columns, rows

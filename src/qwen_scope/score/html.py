"""A scoreboard as one HTML file."""

from __future__ import annotations

from qwen_scope.errors import printable
from qwen_scope.report import element, html_page, html_table

from .board import WITH, WITHOUT, Row, Scoreboard
from .controls import TRAINED
from .suites import SUITES


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
        for suite in board.suites:
            if layer in board.suites[suite]:
                heading = element("h2", f"Layer {layer}, {SUITES[suite].says}")
                parts += [heading, html_table(*suite_table(board, suite, layer))]
    parts += [element("p", f"Not measured: {printable(said)}.") for said in not_measured(board)]
    weak = board.not_better()
    said = "; ".join(f"layer {layer}, {sinks}: {figure} by {arm}" for layer, arm, sinks, figure in weak)
    if any(arm != TRAINED for arms in board.cells.values() for arm in arms):
        parts.append(element("p", f"A control does as well or better: {said}." if weak else "No control does as well."))
    return html_page(f"Scoreboard of {board.run.sae}", *parts)


Cell = str | float


def not_measured(board: Scoreboard) -> list[str]:
    """What could not be measured, and why, as clauses."""
    return [
        f"layer {layer}, {suite}, {item}: {why}"
        for suite, layers in board.unmeasured.items()
        for layer, items in layers.items()
        for item, why in items.items()
    ]


def suite_table(board: Scoreboard, suite: str, layer: int) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
    """A suite of one layer: means over its items."""
    arms = [arm for arm in board.suites[suite][layer] if arm != TRAINED]
    return _table("figure", board.suite_rows(suite, layer), arms)


def score_table(board: Scoreboard, layer: int, sinks: str) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
    """The figures of one layer: the SAE's, then each control's with the gain over it."""
    arms = [arm for arm in board.cells[layer] if arm != TRAINED]
    return _table("figure", board.rows(layer, sinks), arms)


def _table(first: str, found: list[Row], arms: list[str]) -> tuple[tuple[str, ...], list[tuple[Cell, ...]]]:
    columns = (first, TRAINED, *(name for arm in arms for name in (arm, "gain")))
    rows: list[tuple[Cell, ...]] = []
    for name, own, others in found:
        numbers = [own, *(one for _, value, gain in others for one in (value, gain))]
        # NaN: there is none, or neither more nor less is better.
        rows.append((name, *("" if one != one else one for one in numbers)))
    return columns, rows

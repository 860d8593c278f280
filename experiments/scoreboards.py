"""What experiments on scoreboards share: how a scoreboard is kept and told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.sections import table
from qwen_scope.score import SUITES, ScoreRun, score

WITHOUT = "without sinks"


def measured(run: ScoreRun) -> dict[str, Any]:
    """Per table, such as `without sinks` or a suite, the figures with those of every arm; what is missing, and time."""
    board = score(run)
    (layer,) = board.cells
    tables = {sinks: board.rows(layer, sinks) for sinks in (WITHOUT, "with sinks")}
    tables |= {suite: board.suite_rows(suite, layer) for suite in board.suites if layer in board.suites[suite]}
    why = {f"{suite}, {item}": said for suite, one in board.unmeasured.items() for item, said in one[layer].items()}
    return {"tables": tables, "unmeasured": why, "seconds": board.seconds[layer]}


def told(tables: Mapping[str, Sequence[Any]], unmeasured: Mapping[str, str]) -> str:
    """Markdown tables: the SAE, then each control; a star marks a control that is not worse."""
    parts = []
    for name, rows in tables.items():
        arms = [arm for arm, *_ in rows[0][2]] if rows else []
        cells = [(figure, _number(own), *(_beside(*one) for one in others)) for figure, own, others in rows]
        parts += [f"**{SUITES[name].says if name in SUITES else name}**", table(("figure", "SAE", *arms), cells)]
    parts += [f"Not measured: {what}: {why}." for what, why in unmeasured.items()]
    return "\n\n".join(parts)


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.3f}"


def _beside(_: str, value: float | None, gain: float | None) -> str:
    """A control's figure with a star where the SAE is not ahead of it."""
    return _number(value) + (" \\*" if gain is not None and gain == gain and gain <= 0 else "")

"""A scoreboard's figures: every one beside those of the controls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwen_scope.report import HasFrames, Table

from .controls import TRAINED
from .options import ScoreRun
from .suites import better

WITH, WITHOUT = "with sinks", "without sinks"
FIGURES: dict[str, int] = {
    "explained_variance": 1, "explained_variance_per_token": 1, "cosine": 1, "l0": 0, "dead": -1, "ce_recovered": 1,
    "ce_spliced": -1, "kl": -1, "kl_recovered": 1,
}  # fmt: skip
"""What is measured, and whether more (1) or less (-1) of it is better; 0 where neither is."""

Row = tuple[str, float, list[tuple[str, float, float]]]


@dataclass(frozen=True, eq=False, repr=False)
class Scoreboard(HasFrames):
    """The figures.

    Attributes:
        run: what was asked for.
        cells: by layer, arm and `with sinks` or `without sinks` the figures by name.
        seconds: by layer and arm, training of the control included.
        suites: by suite, layer, arm and item (such as a dataset) the figures by name.
        unmeasured: by suite, layer and item why it could not be measured.
    """

    run: ScoreRun
    cells: Mapping[int, Mapping[str, Mapping[str, Mapping[str, float]]]]
    seconds: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    suites: Mapping[str, Mapping[int, Mapping[str, Mapping[str, Mapping[str, float]]]]] = field(default_factory=dict)
    unmeasured: Mapping[str, Mapping[int, Mapping[str, str]]] = field(default_factory=dict)

    def gain(self, layer: int, arm: str, sinks: str, figure: str) -> float:
        """How much better the SAE is than a control, counted so that more is better; NaN where neither is better."""
        sign = FIGURES[figure]
        both = [self.cells[layer][one][sinks][figure] for one in (TRAINED, arm)]
        return sign * (both[0] - both[1]) + 0.0 if sign else float("nan")  # no -0.0

    def not_better(self) -> list[tuple[int, str, str, str]]:
        """Where a control does as well as the SAE or better: layer, control, sinks or suite, and figure."""
        found = [
            (layer, arm, sinks, figure)
            for layer, arms in self.cells.items()
            for arm in arms
            if arm != TRAINED
            for sinks in (WITHOUT, WITH)
            for figure, sign in FIGURES.items()
            if sign and self.gain(layer, arm, sinks, figure) <= 0
        ]
        return found + [
            (layer, arm, suite, figure)
            for suite, layers in self.suites.items()
            for layer in layers
            for figure, _, others in self.suite_rows(suite, layer)
            for arm, _, gain in others
            if gain <= 0
        ]

    def rows(self, layer: int, sinks: str) -> list[Row]:
        """Per figure the SAE's value, and per control its value and the gain over it."""
        arms = [arm for arm in self.cells[layer] if arm != TRAINED]
        own = self.cells[layer][TRAINED][sinks]
        return [
            (
                name,
                own[name],
                [(arm, self.cells[layer][arm][sinks][name], self.gain(layer, arm, sinks, name)) for arm in arms],
            )
            for name in FIGURES
        ]

    def suite_rows(self, suite: str, layer: int) -> list[Row]:
        """As `rows`, for the means of a suite over its items; items without a figure, such as NaN, are left out."""
        found = {arm: _means(items) for arm, items in self.suites[suite].get(layer, {}).items()}
        own = found.pop(TRAINED, {})
        rows = []
        for name, value in own.items():
            others = [(arm, means.get(name, math.nan)) for arm, means in found.items()]
            sign = better(name)
            gains = [sign * (value - other) + 0.0 if sign else math.nan for _, other in others]
            rows.append((name, value, [(arm, other, gain) for (arm, other), gain in zip(others, gains, strict=True)]))
        return rows

    def sheet(self) -> Table:
        """A row per layer, reading (sinks or suite), figure and control: both values and the gain."""
        columns = ("layer", "read", "figure", "value", "control", "control_value", "gain")
        every = [(layer, sinks, self.rows(layer, sinks)) for layer in self.cells for sinks in (WITHOUT, WITH)]
        every += [(layer, suite, self.suite_rows(suite, layer)) for suite, one in self.suites.items() for layer in one]
        rows = [
            (layer, read, name, _plain(value), arm, _plain(other), _plain(gain))
            for layer, read, figures in every
            for name, value, others in figures
            for arm, other, gain in others
        ]
        return Table("Scoreboard", columns, rows)

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN is null."""
        gains = {
            str(layer): {
                arm: {sinks: {f: _plain(self.gain(layer, arm, sinks, f)) for f in FIGURES} for sinks in (WITHOUT, WITH)}
                for arm in arms
                if arm != TRAINED
            }
            for layer, arms in self.cells.items()
        }
        weak = [dict(zip(("layer", "control", "sinks", "figure"), one, strict=True)) for one in self.not_better()]
        layers = {str(layer): {arm: dict(found) for arm, found in arms.items()} for layer, arms in self.cells.items()}
        seconds = {str(layer): dict(found) for layer, found in self.seconds.items()}
        suites = {
            suite: {
                str(layer): {
                    arm: {item: {f: _plain(v) for f, v in one.items()} for item, one in items.items()}
                    for arm, items in arms.items()
                }
                for layer, arms in found.items()
            }
            for suite, found in self.suites.items()
        }
        why = {
            suite: {str(layer): dict(one) for layer, one in found.items()} for suite, found in self.unmeasured.items()
        }
        return {"run": self.run.to_json(), "layers": layers, "gains": gains, "not_better": weak, "seconds": seconds,
                **suites, "unmeasured": why}  # fmt: skip


def _means(items: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    names = next(iter(items.values()), {})
    values = {name: [one[name] for one in items.values() if not math.isnan(one[name])] for name in names}
    return {name: float(np.mean(some)) if some else math.nan for name, some in values.items()}


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value

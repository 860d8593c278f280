"""Figures as plain data; `figure_png` and `figure_html` draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from qwen_scope.errors import check_count


@dataclass(frozen=True)
class Line:
    """One curve, with the band between `low` and `high` where they are given; all four as long as each other."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Curves:
    """Curves over one axis."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False


@dataclass(frozen=True)
class Points:
    """Named points."""

    title: str
    x_label: str
    y_label: str
    names: Sequence[str]
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, eq=False)
class Heatmap:
    """A table of numbers as shades; NaN is left blank.

    Attributes:
        low, high: the values of the lightest and the darkest shade, so that maps of one kind compare; None for the
            smallest or the largest value of this map.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Float[np.ndarray, "rows columns"]
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """The values of the lightest and the darkest shade."""
        known = self.values[~np.isnan(self.values)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        return low if self.low is None else self.low, high if self.high is None else self.high


Figure = Curves | Points | Heatmap


def thinned(n: int, most: int = 200) -> list[int]:
    """At most `most` of the indices 0 to n - 1, evenly, both ends included: enough to draw a curve."""
    check_count("n", n, 0)
    check_count("most", most, 2)
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, most))})

"""Options of analyses; light enough for `--help`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FitOptions:
    """How a rule is made.

    Attributes:
        top: how many features of one layer it has; None for 2, or 16 with weights.
        weighted: weigh the features in place of joining them by OR.
        several: more than 1 for the best feature of each of this many layers instead.
        fpr: raise thresholds until at most this share of the negative documents passes; None leaves them as they are.
        name: of the property; None for the positive documents' name.
        seed: of the split and of intervals.
    """

    top: int | None = None
    weighted: bool = False
    several: int = 1
    fpr: float | None = None
    name: str | None = None
    seed: int = 0

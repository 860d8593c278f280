"""What an estimate is told with; apart from what computes it, so that reading one from a file imports no SciPy."""

from __future__ import annotations

from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval that `level` of its resamples fall into, from `n` samples."""

    estimate: float
    low: float
    high: float
    n: int
    level: float = LEVEL

    def __str__(self) -> str:
        return f"{self:.3g}"

    def __format__(self, spec: str) -> str:
        """Each of the three numbers in a format such as `.3f` or `+.1%`: `0.812 [0.790, 0.833]`."""
        spec = spec or ".3g"
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

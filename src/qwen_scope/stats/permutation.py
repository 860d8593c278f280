"""Permutation tests: how often shuffled labels do as well."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from qwen_scope.errors import InputError


@dataclass(frozen=True)
class Permuted:
    """A statistic beside what it is under shuffled labels.

    Attributes:
        found: the statistic.   mean, high: its mean and 95th percentile under shuffled labels.
        p: the share of shuffles, the real labels counted as one, that reach it.   shuffles: how many.
    """

    found: float
    mean: float
    high: float
    p: float
    shuffles: int


def permuted(found: float, under_shuffling: Float[np.ndarray, " shuffles"]) -> Permuted:
    """The one-sided p-value `(1 + #{shuffled >= found}) / (1 + shuffles)` (Phipson and Smyth 2010).

    Raises:
        InputError: nothing was shuffled.
    """
    if not len(under_shuffling):
        raise InputError("a permutation test needs at least one shuffle")
    reached = int((under_shuffling >= found - 1e-12).sum())
    n = len(under_shuffling)
    return Permuted(
        float(found),
        float(under_shuffling.mean()),
        float(np.quantile(under_shuffling, 0.95)),
        (1 + reached) / (1 + n),
        n,
    )

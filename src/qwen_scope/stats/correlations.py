"""Correlations with intervals: between points, between the pairs of a set, and with a third thing held fixed."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

from qwen_scope.errors import InputError, check_count, check_share

from .bootstrap import RESAMPLES
from .interval import LEVEL, Interval

Kind = Literal["pearson", "spearman"]
FEWEST_POINTS = 4


def correlation(
    x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], kind: Kind = "spearman", *, level: float = LEVEL
) -> Interval:
    """The correlation of paired values, with the interval of Fisher's z.

    The standard error of z is `1 / sqrt(n - 3)`, for Spearman `sqrt((1 + r^2 / 2) / (n - 3))` (Bonett and Wright 2000).

    Raises:
        InputError: fewer than four points, or one side is constant.
    """
    check_share("the level of an interval", level, one=False)
    r = coefficient(x, y, kind)
    n = len(x)
    error = np.sqrt((1 + r**2 / 2 if kind == "spearman" else 1.0) / (n - 3))
    z, half = np.arctanh(np.clip(r, -1 + 1e-15, 1 - 1e-15)), stats.norm.ppf((1 + level) / 2) * error
    return Interval(r, float(np.tanh(z - half)), float(np.tanh(z + half)), n, level)


def coefficient(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], kind: Kind = "spearman") -> float:
    """The bare coefficient; errors as in `correlation`."""
    if len(x) < FEWEST_POINTS:
        raise InputError(f"a correlation needs at least {FEWEST_POINTS} points, not {len(x)}")
    if kind == "spearman":
        x, y = stats.rankdata(x), stats.rankdata(y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise InputError("a correlation needs values that differ; one side is the same everywhere")
    return float(np.clip(np.corrcoef(x, y)[0, 1], -1.0, 1.0))


def partial(r: Float[np.ndarray, "n n"], with_third: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n n"]:
    """Correlations of all pairs with a third variable held fixed: `(r_ij - r_i r_j) / sqrt((1-r_i^2)(1-r_j^2))`.

    Args:
        r: correlations between the variables.   with_third: of each with the third.

    Raises:
        InputError: a variable is a copy of the third, so nothing is left of it.
    """
    left = 1 - with_third**2
    if (left < 1e-12).any():
        raise InputError("a variable correlates perfectly with the one to be held fixed, so nothing is left of it")
    return (r - np.outer(with_third, with_third)) / np.sqrt(np.outer(left, left))


def pair_correlation(
    a: Float[np.ndarray, "n n"],
    b: Float[np.ndarray, "n n"],
    kind: Kind = "spearman",
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Interval, float]:
    """The correlation of two symmetric tables over their pairs, an interval, and a p-value.

    Pairs that share a member are not independent, so the interval resamples members (the vertex bootstrap of Snijders
    and Borgatti 1999, pairs of a member with itself left out) and the two-sided p-value permutes them (Mantel 1967).

    Raises:
        InputError: fewer than four members, or one table is the same everywhere.
    """
    check_share("the level of an interval", level, one=False)
    check_count("resamples", resamples)
    n = len(a)
    if n < FEWEST_POINTS:
        raise InputError(f"a correlation over pairs needs at least {FEWEST_POINTS} members, not {n}")
    upper = np.triu_indices(n, 1)
    found = coefficient(a[upper], b[upper], kind)
    rng = np.random.default_rng(seed)
    drawn, exceeding = [], 0
    for _ in range(resamples):
        chosen = rng.integers(0, n, n)
        i, j = chosen[upper[0]], chosen[upper[1]]
        keep = i != j
        x, y = a[i[keep], j[keep]], b[i[keep], j[keep]]
        if len(x) >= FEWEST_POINTS and np.ptp(x) > 0 and np.ptp(y) > 0:
            drawn.append(coefficient(x, y, kind))
        order = rng.permutation(n)
        exceeding += abs(coefficient(a[upper], b[order[upper[0]], order[upper[1]]], kind)) >= abs(found) - 1e-12
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(found, float(low), float(high), n, level), (1 + exceeding) / (1 + resamples)


def kendall(a: Float[np.ndarray, " n"], b: Float[np.ndarray, "many n"]) -> Float[np.ndarray, " many"]:
    """Kendall's tau-b between `a` and each row of `b`; 0 where either ranks nothing (all values equal)."""
    i, j = np.triu_indices(len(a), 1)
    one, two = np.sign(a[i] - a[j]), np.sign(b[:, i] - b[:, j])
    size = np.sqrt((one != 0).sum() * (two != 0).sum(1))
    return np.where(size > 0, (two * one).sum(1) / np.maximum(size, 1), 0.0)

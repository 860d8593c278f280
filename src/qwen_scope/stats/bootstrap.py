"""Bootstrap intervals of means and of differences of means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from qwen_scope.errors import InputError, check_share

from .interval import LEVEL, Interval

RESAMPLES, FEWEST = 2000, 2


def bootstrap(values: Sequence[float] | Float[np.ndarray, " n"], *, level: float = LEVEL, seed: int = 0) -> Interval:
    """The mean with its percentile bootstrap interval (Efron 1979), reproducible by `seed`.

    Raises:
        InputError: fewer than two values, or one that is not finite.
    """
    array = _checked(values)
    low, high = _interval((array,), _mean, level, seed)
    return Interval(float(array.mean()), low, high, len(array), level)


def difference(
    a: Sequence[float] | Float[np.ndarray, " n"],
    b: Sequence[float] | Float[np.ndarray, " m"],
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Mean of `a` minus mean of `b`, the two resampled independently; `n` is the smaller sample.

    Raises:
        InputError: as in `bootstrap`.
    """
    first, second = _checked(a), _checked(b)
    low, high = _interval((first, second), _difference, level, seed)
    return Interval(float(first.mean() - second.mean()), low, high, min(len(first), len(second)), level)


def resample(
    a: Float[np.ndarray, " n"],
    b: Float[np.ndarray, " m"],
    statistic: Callable[..., np.ndarray],
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Any statistic of two samples with its percentile bootstrap interval, the two resampled independently.

    Args:
        statistic: `statistic(a, b, axis=-1)`, over the last axis of arrays `(..., n)` and `(..., m)`.

    Raises:
        InputError: as in `bootstrap`.
    """
    first, second = _checked(a), _checked(b)
    low, high = _interval((first, second), statistic, level, seed)
    return Interval(float(statistic(first, second, axis=-1)), low, high, min(len(first), len(second)), level)


def _mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    return values.mean(axis)


def _difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    return a.mean(axis) - b.mean(axis)


def _interval(samples: tuple[np.ndarray, ...], statistic, level: float, seed: int) -> tuple[float, float]:
    check_share("the level of an interval", level, one=False)
    found = stats.bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _checked(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < FEWEST:
        raise InputError(f"an interval needs at least {FEWEST} values in one list, not an array of {array.shape}")
    if not np.isfinite(array).all():
        raise InputError("an interval needs finite values")
    return array

"""Many comparisons at once: how well each column tells two groups apart, and which of the findings to believe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Shaped
from scipy import stats

from qwen_scope.errors import InputError


def benjamini_hochberg(
    p: Sequence[float] | Shaped[np.ndarray, "*tests"], tests: int | None = None
) -> Float[np.ndarray, "*tests"]:
    """Adjusted p-values: calling everything at or below `level` a finding keeps the expected share of false findings
    at or below `level` (Benjamini and Hochberg 1995, for independent or positively dependent tests).

    Args:
        p: p-values in [0, 1], of any shape.
        tests: how many tests there were in all, where only the most telling p-values are given; the rest count as 1.

    Raises:
        InputError: a value outside [0, 1], or fewer tests than p-values.
    """
    array = np.asarray(p, np.float64)
    if not ((array >= 0) & (array <= 1)).all():
        raise InputError("p-values lie between 0 and 1")
    if tests is None:
        tests = array.size
    if tests < array.size:
        raise InputError(f"{array.size} p-values come from at least as many tests, not from {tests}")
    if not array.size:
        return array
    # scipy divides by the number it is given; the tests that are not here would all stand behind, with p = 1.
    adjusted = stats.false_discovery_control(np.concatenate([array.ravel(), np.ones(tests - array.size)]))
    return adjusted[: array.size].reshape(array.shape)


def auroc(
    positive: Shaped[np.ndarray, "n ..."], negative: Shaped[np.ndarray, "m ..."]
) -> Float[np.ndarray, " *columns"]:
    """The chance, per column, that a random positive value exceeds a random negative one, ties counted half.

    Raises:
        InputError: an empty group.
    """
    n, m = _sizes(positive, negative)
    ranks = stats.rankdata(np.concatenate([positive, negative]), axis=0)
    return np.asarray((ranks[:n].sum(0) - n * (n + 1) / 2) / (n * m))


def rank_test(
    positive: Shaped[np.ndarray, "n columns"], negative: Shaped[np.ndarray, "m columns"]
) -> Float[np.ndarray, " columns"]:
    """Per column the two-sided p-value of the Mann-Whitney test, by its normal approximation with ties and continuity.

    A column whose values are all the same has p = 1.

    Raises:
        InputError: an empty group.
    """
    _sizes(positive, negative)
    both = np.concatenate([positive, negative])
    varies = both.min(0) < both.max(0)
    p = np.ones(both.shape[1])
    if varies.any():
        p[varies] = stats.mannwhitneyu(
            positive[:, varies], negative[:, varies], alternative="two-sided", method="asymptotic", axis=0
        ).pvalue
    return np.minimum(p, 1.0)


def _sizes(positive: np.ndarray, negative: np.ndarray) -> tuple[int, int]:
    if not len(positive) or not len(negative):
        raise InputError(f"two groups are needed, not {len(positive)} positive and {len(negative)} negative values")
    return len(positive), len(negative)

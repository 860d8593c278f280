"""Ratios over clusters: intervals that resample columns together, and a test that is the t-test where sizes agree."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from qwen_scope.errors import InputError
from qwen_scope.stats import ClusterSums, ratio_test


def p_of(y: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The p-values of columns `(clusters, columns)`."""
    return ratio_test(y.sum(0), (y**2).sum(0), n @ y, n.sum(), float((n**2).sum()), len(n))


def test_with_clusters_of_one_size_it_is_the_t_test() -> None:
    y = np.random.default_rng(0).normal(0.3, 1.0, (30, 5))
    assert p_of(y, np.full(30, 7.0)) == pytest.approx(stats.ttest_1samp(y, 0).pvalue)


def test_under_the_null_a_twentieth_is_called() -> None:
    g = np.random.default_rng(1)
    n = g.integers(5, 60, 80).astype(float)
    y = g.normal(0, 1, (80, 4000)) * np.sqrt(n)[:, None]
    assert 0.04 < (p_of(y, n) < 0.05).mean() < 0.065


def test_a_column_that_never_varies_is_no_finding() -> None:
    assert p_of(np.zeros((6, 2)), np.arange(1.0, 7.0)).tolist() == [1, 1]
    with pytest.raises(InputError, match="at least 2"):
        p_of(np.ones((1, 2)), np.ones(1))


def test_intervals_see_the_same_resamples_and_have_the_width_of_the_standard_error() -> None:
    g = np.random.default_rng(2)
    n = g.integers(10, 50, 300).astype(float)
    y = 0.4 * n + g.normal(0, 2, 300)
    sums = ClusterSums({"y": y, "n": n, "z": y + 0.1 * n}, seed=3)
    ratio = sums.interval(lambda s: s["y"] / s["n"])
    residual = y - y.sum() / n.sum() * n
    error = np.sqrt((residual**2).sum() * 300 / 299) / n.sum()
    assert ratio.estimate == pytest.approx(y.sum() / n.sum())
    assert ratio.high - ratio.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    change = sums.interval(lambda s: (s["z"] - s["y"]) / s["n"])
    assert (change.low, change.high) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize("columns", [{"y": np.ones(1)}, {"y": np.ones(3), "n": np.ones(4)}])
def test_columns_that_allow_no_interval(columns: dict) -> None:
    with pytest.raises(InputError, match="at least 2 clusters"):
        ClusterSums(columns)

"""Ratios of sums over clusters (documents): intervals from whole clusters resampled, and tests of many at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float
from scipy import stats

from qwen_scope.errors import InputError, check_share

from .bootstrap import FEWEST, RESAMPLES
from .interval import LEVEL, Interval


class ClusterSums:
    """Sums by cluster of several columns, resampled together: every figure sees the same resamples.

    Args:
        columns: by name, `(clusters,)` each.   seed: of the resamples.

    Raises:
        InputError: fewer than two clusters, or columns of different lengths.
    """

    def __init__(self, columns: Mapping[str, Float[np.ndarray, " clusters"]], *, seed: int = 0) -> None:
        lengths = {len(values) for values in columns.values()}
        if len(lengths) != 1 or min(lengths) < FEWEST:
            raise InputError(f"an interval needs at least {FEWEST} clusters of every column, not {sorted(lengths)}")
        self.n = lengths.pop()
        draws = np.random.default_rng(seed).multinomial(self.n, np.full(self.n, 1 / self.n), size=RESAMPLES)
        self.whole = {name: values.sum(keepdims=True).astype(np.float64) for name, values in columns.items()}
        self.resampled = {name: draws @ values for name, values in columns.items()}

    def interval(self, figure: Callable[[Mapping[str, np.ndarray]], np.ndarray], level: float = LEVEL) -> Interval:
        """A figure of the columns' sums with its percentile interval (Efron 1979).

        Args:
            figure: from the sums by name, over whole arrays of them; NaN and infinity are taken as they come.
        """
        check_share("the level of an interval", level, one=False)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = float(figure(self.whole)[0])
            drawn = np.asarray(figure(self.resampled), np.float64)
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        return Interval(found, float(low), float(high), self.n, level)


def ratio_test(
    sums: Float[np.ndarray, " columns"],
    squares: Float[np.ndarray, " columns"],
    with_sizes: Float[np.ndarray, " columns"],
    sizes: float,
    sizes_squared: float,
    clusters: int,
) -> Float[np.ndarray, " columns"]:
    """Per column the two-sided p-value that the ratio `sum_c y_c / sum_c n_c` is zero, clusters being independent.

    The variance is that of the ratio estimator by linearisation (Cochran 1977, section 2.11), from
    `e_c = y_c - ratio * n_c`, and t has one degree of freedom less than there are clusters. Columns that never vary
    have p = 1.

    Args:
        sums, squares, with_sizes: `sum_c y_c`, `sum_c y_c^2` and `sum_c y_c n_c` of each column.
        sizes, sizes_squared: `sum_c n_c` and `sum_c n_c^2`.

    Raises:
        InputError: fewer than two clusters.
    """
    if clusters < FEWEST:
        raise InputError(f"a test over clusters needs at least {FEWEST}, not {clusters}")
    ratio = sums / sizes
    residual = np.maximum(squares - 2 * ratio * with_sizes + ratio**2 * sizes_squared, 0)
    error = np.sqrt(residual * clusters / (clusters - 1))
    t = np.divide(np.abs(sums), error, out=np.zeros_like(sums, dtype=np.float64), where=error > 0)
    return 2 * stats.t.sf(t, clusters - 1)

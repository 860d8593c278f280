"""Shares and their differences, and how well a decision does, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import stats

from qwen_scope.errors import InputError, check_count, check_share

from .bootstrap import RESAMPLES
from .interval import LEVEL, Interval

Count = int | Int[np.ndarray, "..."]


@dataclass(frozen=True)
class Rates:
    """How well a decision does on labelled items.

    Attributes:
        precision, recall, f1, fpr: with intervals; recall is the true-positive rate, fpr the false-positive rate.
        positives, negatives: items of each class.
        tpr_at_fpr: the true-positive rate where the false-positive rate is at most `fixed_fpr`, for decisions that
            come with a score; else None.
    """

    precision: Interval
    recall: Interval
    f1: Interval
    fpr: Interval
    positives: int
    negatives: int
    tpr_at_fpr: Interval | None = None
    fixed_fpr: float | None = None


def wilson(successes: Count, n: Count, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Low and high end of Wilson's score interval (1927) of a share, elementwise; 0 to 1 where there is no trial."""
    check_share("the level of an interval", level, one=False)
    s, n = np.asarray(successes, float), np.asarray(n, float)
    z2 = stats.norm.ppf((1 + level) / 2) ** 2
    safe = np.maximum(n, 1e-300)
    centre = (s + z2 / 2) / (safe + z2)
    half = np.sqrt(z2) / (safe + z2) * np.sqrt(np.maximum(s * (safe - s) / safe, 0) + z2 / 4)
    low = np.where(s == 0, 0.0, centre - half)
    high = np.where(s == n, 1.0, centre + half)
    return np.where(n > 0, np.clip(low, 0, 1), 0.0), np.where(n > 0, np.clip(high, 0, 1), 1.0)


def rate_difference(a: Count, n_a: Count, b: Count, n_b: Count, level: float = LEVEL) -> tuple[np.ndarray, ...]:
    """`a / n_a - b / n_b` with Newcombe's hybrid score interval (1998, method 10), elementwise: (value, low, high)."""
    p, q = np.asarray(a) / np.asarray(n_a), np.asarray(b) / np.asarray(n_b)
    low_p, high_p = wilson(a, n_a, level)
    low_q, high_q = wilson(b, n_b, level)
    d = p - q
    ends = d - np.hypot(p - low_p, high_q - q), d + np.hypot(high_p - p, q - low_q)
    return tuple(np.asarray(value) for value in (d, *ends))


def share(successes: int, n: int, level: float = LEVEL) -> Interval:
    """A share with Wilson's interval; 0 of 0 is 0."""
    low, high = wilson(successes, n, level)
    return Interval(successes / n if n else 0.0, float(low), float(high), n, level)


def rates(
    called: Bool[np.ndarray, " items"],
    labels: Bool[np.ndarray, " items"],
    scores: Float[np.ndarray, " items"] | None = None,
    *,
    fixed_fpr: float = 0.01,
    level: float = LEVEL,
    seed: int = 0,
) -> Rates:
    """Precision, recall, F1 and false-positive rate; with `scores` also the true-positive rate at a fixed one.

    Shares have Wilson's interval, F1 and the rate at a fixed false-positive rate a percentile bootstrap one, in which
    each class is resampled by itself.

    Raises:
        InputError: no item, or all of one class.
    """
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        raise InputError(f"rates need items of both classes, not {positives} positive and {negatives} negative ones")
    hits, alarms = int((called & labels).sum()), int((called & ~labels).sum())
    rng = np.random.default_rng(seed)
    drawn_hits = rng.binomial(positives, hits / positives, RESAMPLES)
    drawn_alarms = rng.binomial(negatives, alarms / negatives, RESAMPLES)
    f1 = 2 * hits / (hits + alarms + positives)
    drawn = 2 * drawn_hits / (drawn_hits + drawn_alarms + positives)
    at_fixed = None
    if scores is not None:
        at_fixed = tpr_at(scores[labels], scores[~labels], fixed_fpr, level, rng)
    return Rates(
        share(hits, hits + alarms, level),
        share(hits, positives, level),
        Interval(f1, *_ends(drawn, level), len(labels), level),
        share(alarms, negatives, level),
        positives,
        negatives,
        at_fixed,
        None if scores is None else fixed_fpr,
    )


def threshold_at(negatives: Float[np.ndarray, " n"], fpr: float) -> float:
    """The smallest of these scores, such that at most a share `fpr` of them lies *above* it.

    Raises:
        InputError: no score, or a rate that is not between 0 and 1.
    """
    if not len(negatives):
        raise InputError("a threshold needs negative items")
    check_share("a false-positive rate", fpr, zero=True, one=False)
    allowed = int(np.floor(fpr * len(negatives) + 1e-9))
    return float(np.sort(negatives)[::-1][allowed])


def tpr_at(
    positives: Float[np.ndarray, " n"],
    negatives: Float[np.ndarray, " m"],
    fpr: float,
    level: float = LEVEL,
    rng: np.random.Generator | None = None,
    resamples: int = 500,
) -> Interval:
    """The share of positives above the threshold that keeps the false-positive rate of the negatives at most `fpr`."""
    check_count("resamples", resamples)
    rng = rng or np.random.default_rng(0)
    found = float((positives > threshold_at(negatives, fpr)).mean())
    drawn = [
        float((rng.choice(positives, len(positives)) > threshold_at(rng.choice(negatives, len(negatives)), fpr)).mean())
        for _ in range(resamples)
    ]
    return Interval(found, *_ends(np.array(drawn), level), len(positives), level)


def _ends(drawn: Shaped[np.ndarray, " n"], level: float) -> tuple[float, float]:
    check_share("the level of an interval", level, one=False)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

"""Counts, shares and rates that can't be are refused in the rooms `analysis`, `stats` and `report`."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from qwen_scope.analysis import (
    Labelled,
    Rule,
    RuleFeature,
    clusters,
    distance_test,
    drift_of,
    evaluate,
    greedy,
    near_duplicates,
    overlap_of,
    ranking,
    sampled_coverage,
    subset_of,
)
from qwen_scope.analysis.dataset import Dataset, Scores
from qwen_scope.errors import InputError
from qwen_scope.report import thinned
from qwen_scope.stats import (
    bootstrap,
    correlation,
    difference,
    pair_correlation,
    rate_difference,
    rates,
    resample,
    share,
    threshold_at,
    tpr_at,
    wilson,
)
from qwen_scope.steer import repetition

ITEM, FEATURE = np.repeat(np.arange(8, dtype=np.int32), 2), np.tile(np.array([0, 1, 2, 3], np.int32), 4)
DATA = Dataset("one", tuple("abcdefgh"), 2, 4, "f", ITEM, FEATURE, np.ones(16, np.float32), ITEM)
LABELS = np.arange(8) % 2 == 0
OTHER = replace(DATA, name="two")
SEEDS = Labelled({2: DATA}, LABELS)
RULE = Rule("r", (RuleFeature(2, 0, 0.0, 1.0, 1.0, "f"),), {})
VALUES = np.arange(8.0)
TABLE = np.abs(np.subtract.outer(VALUES, VALUES)) + np.outer(VALUES, VALUES) % 3
SCORES = Scores(("m", "n", "o"), np.random.default_rng(0).random((8, 3)))

COUNTS = {
    "repetition": lambda n: repetition([1, 2, 1, 2, 1], n),
    "ranking": lambda n: ranking(SCORES, n),
    "sampled_coverage": lambda n: sampled_coverage(DATA, n),
    "distance_test": lambda n: distance_test(DATA, DATA, n, 0),
    "drift, shuffles": lambda n: drift_of([DATA, OTHER], shuffles=n),
    "subset, draws": lambda n: subset_of([DATA], draws=n),
    "pair_correlation": lambda n: pair_correlation(TABLE, TABLE, resamples=n),
    "tpr_at, resamples": lambda n: tpr_at(VALUES, VALUES, 0.1, resamples=n),
    "thinned": lambda n: thinned(9, n),
}
"""Everything that takes how many, from 1 up."""

OPEN = {
    "bootstrap": lambda x: bootstrap(VALUES, level=x),
    "difference": lambda x: difference(VALUES, VALUES, level=x),
    "resample": lambda x: resample(VALUES, VALUES, lambda a, b, axis=-1: a.mean(axis) - b.mean(axis), level=x),
    "wilson": lambda x: wilson(2, 5, x),
    "rate_difference": lambda x: rate_difference(2, 5, 1, 5, x),
    "share": lambda x: share(2, 5, x),
    "rates, level": lambda x: rates(LABELS, LABELS, level=x),
    "correlation": lambda x: correlation(VALUES, VALUES**2, level=x),
    "pair_correlation": lambda x: pair_correlation(TABLE, TABLE, level=x),
    "tpr_at, level": lambda x: tpr_at(VALUES, VALUES, 0.1, x),
    "split": lambda x: SEEDS.split(x),
    "drift, level": lambda x: drift_of([DATA, OTHER], level=x),
}
"""Everything that takes a share above 0 and below 1."""

HALF_OPEN = {
    "threshold_at": lambda x: threshold_at(VALUES, x),
    "tpr_at": lambda x: tpr_at(VALUES, VALUES, x),
    "rates, fpr": lambda x: rates(LABELS, LABELS, VALUES, fixed_fpr=x),
    "evaluate": lambda x: evaluate(RULE, SEEDS, x),
    "calibrated": lambda x: RULE.calibrated({2: DATA}, x),
    "greedy": lambda x: greedy(DATA, x),
    "subset, share": lambda x: subset_of([DATA], share=x),
    "near_duplicates": lambda x: near_duplicates(DATA, DATA, x),
    "drift, near": lambda x: drift_of([DATA, OTHER], near=x),
    "clusters": lambda x: clusters(np.eye(3), x),
    "overlap, newcomer": lambda x: overlap_of([DATA, OTHER], newcomer=x),
    "overlap, cut": lambda x: overlap_of([DATA, OTHER], cut=x),
}
"""Everything that takes a share with one of its ends, or both."""


@pytest.mark.parametrize("wrong", [-3, 0, True])
@pytest.mark.parametrize("name", COUNTS)
def test_a_wrong_count_is_refused(name: str, wrong) -> None:
    with pytest.raises(InputError, match="whole number of at least"):
        COUNTS[name](wrong)


@pytest.mark.parametrize("wrong", [-0.1, 0.0, 1.0, 1.5, math.nan, math.inf, True])
@pytest.mark.parametrize("name", OPEN)
def test_a_share_that_can_not_be_is_refused(name: str, wrong) -> None:
    with pytest.raises(InputError):
        OPEN[name](wrong)


@pytest.mark.parametrize("wrong", [-0.1, 1.5, math.nan, math.inf, -math.inf, True])
@pytest.mark.parametrize("name", HALF_OPEN)
def test_a_rate_that_can_not_be_is_refused(name: str, wrong) -> None:
    with pytest.raises(InputError):
        HALF_OPEN[name](wrong)


@pytest.mark.parametrize("name", OPEN)
def test_a_share_within_is_taken(name: str) -> None:
    OPEN[name](0.5)


def test_ends_that_are_shares_are_taken() -> None:
    assert threshold_at(VALUES, 0.0) == 7.0
    assert len(greedy(DATA, 1.0)[0]) == 2
    assert repetition([1, 2, 1, 2], 2) == pytest.approx(1 / 3)

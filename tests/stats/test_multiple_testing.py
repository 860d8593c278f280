"""False discovery control and AUROC, against their definitions written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qwen_scope.errors import InputError
from qwen_scope.stats import auroc, benjamini_hochberg, rank_test


def by_definition(p: list[float]) -> list[float]:
    """The smallest level at which the step-up procedure of the paper rejects each hypothesis."""
    m, ordered = len(p), sorted(p)
    return [min(min(1.0, ordered[k - 1] * m / k) for k in range(1, m + 1) if ordered[k - 1] >= one) for one in p]


def test_adjusted_p_values_are_those_of_the_step_up_procedure() -> None:
    p = np.random.default_rng(0).random(50) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), by_definition(p.tolist()))
    np.testing.assert_allclose(benjamini_hochberg(p.reshape(5, 10)), benjamini_hochberg(p).reshape(5, 10))


def test_tests_that_are_left_out_count_as_one() -> None:
    p = np.array([1e-6, 0.001, 0.2])
    np.testing.assert_allclose(benjamini_hochberg(p, tests=1000), by_definition([*p, *[1.0] * 997])[:3])
    assert benjamini_hochberg([], tests=7).size == 0


@pytest.mark.parametrize(("p", "tests"), [([0.1, 1.5], None), ([-0.1], None), ([float("nan")], None), ([0.1, 0.2], 1)])
def test_what_is_no_p_value_is_refused(p: list[float], tests: int | None) -> None:
    with pytest.raises(InputError):
        benjamini_hochberg(p, tests)


def test_auroc_counts_the_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 4, (7, 3)).astype(float), rng.integers(0, 4, (5, 3)).astype(float)
    for column, found in enumerate(auroc(a, b)):
        pairs = [(x > y) + (x == y) / 2 for x, y in itertools.product(a[:, column], b[:, column])]
        assert found == pytest.approx(np.mean(pairs))
    with pytest.raises(InputError, match="two groups"):
        auroc(a, b[:0])


def test_the_rank_test_holds_its_level_and_has_power() -> None:
    rng = np.random.default_rng(2)
    # Mostly zeros, as features are.
    null = np.maximum(0, rng.normal(size=(60, 3000)) - 1)
    p = rank_test(null[:30], null[30:])
    assert (p < 0.05).mean() < 0.055
    assert (p < 0.001).mean() < 0.0035
    shifted = rng.normal(size=(30, 20)) + 2
    assert (rank_test(shifted, rng.normal(size=(30, 20))) < 1e-4).all()
    assert rank_test(np.ones((3, 2)), np.ones((4, 2))).tolist() == [1.0, 1.0]

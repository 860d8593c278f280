"""Bootstrap intervals: coverage on known distributions, reproducibility, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_scope.errors import InputError
from qwen_scope.stats import Interval, bootstrap, difference


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = hits_difference = 0
    for i in range(200):
        a, b = rng.exponential(1.0, 60), rng.normal(0.4, 1.0, 50)
        one, two = bootstrap(a, seed=i), difference(a, b, seed=i)
        hits += one.low <= 1.0 <= one.high
        hits_difference += two.low <= 0.6 <= two.high
    assert 0.88 <= hits / 200 <= 0.99
    assert 0.88 <= hits_difference / 200 <= 0.99


def test_the_estimate_is_the_mean_and_the_seed_decides() -> None:
    values = np.arange(10.0)
    found = bootstrap(values, seed=3)
    assert (found.estimate, found.n) == (4.5, 10)
    assert found.low < 4.5 < found.high
    assert bootstrap(values, seed=3) == found
    assert difference(values, values + 1).estimate == -1.0
    constant = bootstrap([2.0, 2.0, 2.0])
    assert (constant.low, constant.high) == (2.0, 2.0)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")]])
def test_what_has_no_interval(values) -> None:
    with pytest.raises(InputError):
        bootstrap(np.asarray(values))


def test_an_interval_is_told_in_any_format_of_a_number() -> None:
    found = Interval(0.8125, -0.0421, 1.5, 10)
    assert f"{found:.3f}" == "0.812 [-0.042, 1.500]"
    assert f"{found:+.1%}" == "+81.2% [-4.2%, +150.0%]"
    assert str(found) == f"{found}" == "0.812 [-0.0421, 1.5]"

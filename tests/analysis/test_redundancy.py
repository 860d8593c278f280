"""Redundancy against enumeration over all subsets, and against sampling."""

from __future__ import annotations

from itertools import combinations

import made
import numpy as np
import pytest
from scipy import stats

from qwen_scope.analysis import expected_coverage, jackknife, ranking, redundancy_of, sampled_coverage
from qwen_scope.errors import InputError, MismatchError


@pytest.mark.parametrize("seed", range(5))
def test_closed_forms_equal_all_subsets(seed: int) -> None:
    sets = made.random_sets(8, 12, seed)
    footprint = set().union(*sets)
    curve = [
        np.mean([len(set().union(*(sets[i] for i in chosen))) for chosen in combinations(range(8), n)]) / len(footprint)
        for n in range(1, 9)
    ]
    found = expected_coverage(made.dataset(sets).counts(), 8)
    np.testing.assert_allclose(found.curve, curve, rtol=0, atol=1e-12)
    assert found.footprint == len(footprint)
    assert found.redundancy == pytest.approx(sum(curve) / len(footprint), abs=1e-12)
    assert found.auc == pytest.approx(np.mean(curve), abs=1e-12)


def test_the_curve_stays_exact_for_many_items() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 5000, 300)
    found = expected_coverage(counts, 5000)
    n = np.array([1, 17, 2500, 4999, 5000])
    exact = 1 - stats.hypergeom.pmf(0, 5000, counts[:, None], n).mean(0)
    np.testing.assert_allclose(found.curve[n - 1], exact, atol=1e-10)
    assert found.curve.sum() / 300 == pytest.approx(found.redundancy, rel=1e-12)


def test_the_sampled_estimate_lies_in_its_interval() -> None:
    data = made.dataset(made.random_sets(400, 200, 3, 0.05), 200)
    exact = expected_coverage(data.counts(), 400)
    sampled = sampled_coverage(data, 300, seed=1)
    each = sampled.sum(1) / exact.footprint
    assert abs(each.mean() - exact.redundancy) < 3 * each.std(ddof=1) / np.sqrt(300)
    error = sampled.std(0, ddof=1) / np.sqrt(300)
    assert (np.abs(sampled.mean(0) - exact.curve) < 4.5 * error + 1e-12).all()
    assert (sampled[:, -1] == 1).all()


def test_jackknife_equals_leaving_out_one_by_one() -> None:
    sets = made.random_sets(9, 14, 4)
    left = [
        expected_coverage(made.dataset([s for j, s in enumerate(sets) if j != i], 14).counts(), 8).redundancy
        for i in range(9)
    ]
    expected = np.sqrt(8 / 9 * ((np.array(left) - np.mean(left)) ** 2).sum())
    assert jackknife(made.dataset(sets, 14)) == pytest.approx(expected, abs=1e-12)


def test_twice_the_features_is_half_as_redundant() -> None:
    sets = made.random_sets(6, 10, 2)
    doubled = [s | {f + 10 for f in s} for s in sets]
    one, two = (
        expected_coverage(made.dataset(sets, 10).counts(), 6),
        expected_coverage(made.dataset(doubled, 20).counts(), 6),
    )
    assert two.redundancy == pytest.approx(one.redundancy / 2, abs=1e-12)
    assert two.auc == pytest.approx(one.auc, abs=1e-12)


def test_ranking_equals_all_subsets_on_average() -> None:
    rng = np.random.default_rng(5)
    values = (rng.random((6, 5)) < np.linspace(0.2, 0.9, 5)).astype(float)
    whole = values.mean(0).round(9)
    expected = []
    for n in range(1, 7):
        taus = [stats.kendalltau(whole, values[list(c)].mean(0).round(9)).statistic for c in combinations(range(6), n)]
        expected.append(np.mean(np.nan_to_num(taus)))
    data = made.dataset(made.random_sets(6, 12, 0), scores=values)
    assert data.scores is not None
    found = ranking(data.scores, draws=4000, seed=0)
    np.testing.assert_allclose(found.tau, expected, atol=0.03)
    assert found.redundancy.low <= np.mean(expected) <= found.redundancy.high
    assert found.tau[-1] == pytest.approx(1.0)


def test_the_analysis_compares_features_with_scores() -> None:
    rng = np.random.default_rng(0)
    several = []
    for i, n in enumerate((5, 20, 40, 60)):
        scores = (rng.random((n, 6)) < np.linspace(0.2, 0.9, 6)).astype(float)
        several.append(made.dataset(made.random_sets(n, 12, i), name=f"d{i}", scores=scores))
    result = redundancy_of(several, draws=20)
    assert set(result.data["datasets"]) == {"d0", "d1", "d2", "d3"}
    assert -1 <= result.data["agreement"]["R-hat and R"]["estimate"] <= 1
    assert len(result.figures) == 3
    again = redundancy_of(several, draws=20)
    assert again.data == result.data


def test_bad_input_is_one_sentence() -> None:
    one = made.dataset([{1}, {2}])
    with pytest.raises(InputError, match="empty"):
        made.dataset([])
    with pytest.raises(InputError, match="no feature fires"):
        redundancy_of([made.dataset([set(), set()])])
    with pytest.raises(InputError, match="two datasets are called"):
        redundancy_of([one, one])
    with pytest.raises(MismatchError, match="different SAEs"):
        redundancy_of([one, made.dataset([{1}], name="b", sae="t" * 12)])
    with pytest.raises(InputError, match="at least three models"):
        redundancy_of([made.dataset([{1}, {2}], scores=np.zeros((2, 5)))])

"""Overlap, its clusters, and its correlation with performance, against sets and formulas restated."""

from __future__ import annotations

import made
import numpy as np
import pytest
from scipy import stats as scipy_stats

from qwen_scope.analysis import clusters, overlap_of, overlaps
from qwen_scope.errors import InputError
from qwen_scope.stats import pair_correlation, partial


def suite(seed: int = 0, models: int = 8) -> list:
    rng = np.random.default_rng(seed)
    ability = rng.normal(size=models)
    return [
        made.dataset(
            made.random_sets(6, 30, seed + i, 0.1),
            30,
            f"d{i}",
            scores=ability + rng.normal(size=(6, models)),
        )
        for i in range(6)
    ]


def test_overlaps_equal_set_arithmetic() -> None:
    several = suite()
    covered, smaller = overlaps(several)
    footprints = [set(d.feature.tolist()) for d in several]
    for i, a in enumerate(footprints):
        for j, b in enumerate(footprints):
            assert covered[i, j] == pytest.approx(len(a & b) / len(a), abs=1e-12)
            assert smaller[i, j] == pytest.approx(len(a & b) / min(len(a), len(b)), abs=1e-12)


def test_clusters_join_what_is_alike() -> None:
    similar = np.full((5, 5), 0.1)
    similar[:2, :2] = 0.8
    similar[2:4, 2:4] = 0.6
    np.fill_diagonal(similar, 1)
    order, found = clusters(similar, 0.5)
    assert found[0] == found[1] != found[2] == found[3] != found[4] != found[0]
    assert abs(order.index(0) - order.index(1)) == 1
    assert len(set(clusters(similar, 0.9)[1])) == 5


def test_partial_equals_correlating_residuals() -> None:
    rng = np.random.default_rng(1)
    z = rng.normal(size=50)
    x, y = z + rng.normal(size=50), -z + rng.normal(size=50)
    r = np.corrcoef([x, y, z])
    found = partial(r[:2, :2], r[:2, 2])[0, 1]
    rest = [v - np.polyval(np.polyfit(z, v, 1), z) for v in (x, y)]
    assert found == pytest.approx(np.corrcoef(rest)[0, 1], abs=1e-12)


def test_pair_correlation_is_that_of_the_pairs_and_sees_chance() -> None:
    rng = np.random.default_rng(2)
    a = rng.random((9, 9))
    a = a + a.T
    upper = np.triu_indices(9, 1)
    noise = rng.random((9, 9))
    alike = a + 0.1 * (noise + noise.T)
    for kind, reference in (("pearson", scipy_stats.pearsonr), ("spearman", scipy_stats.spearmanr)):
        one, p = pair_correlation(a, alike, kind, resamples=300)
        assert one.estimate == pytest.approx(reference(a[upper], alike[upper]).statistic, abs=1e-12)
        assert one.low <= one.estimate <= one.high
        assert p < 0.02
    _, p = pair_correlation(a, noise + noise.T, resamples=300)
    assert p > 0.05


def test_the_analysis_with_and_without_the_general_benchmark() -> None:
    several = suite()
    result = overlap_of(several, general="d0")
    found = result.data["performance"]
    assert {key.split(",")[0] for key in found} == {"direct", "with d0 held fixed"}
    means = np.stack([d.scores.values.mean(0) for d in several])
    r = np.corrcoef(means)
    _, smaller = overlaps(several)
    upper = np.triu_indices(5, 1)
    rest = [
        [(r[i, j] - r[i, 0] * r[j, 0]) / np.sqrt((1 - r[i, 0] ** 2) * (1 - r[j, 0] ** 2)) for j in range(1, 6)]
        for i in range(1, 6)
    ]
    expected = scipy_stats.pearsonr(smaller[1:, 1:][upper], np.array(rest)[upper]).statistic
    assert found["with d0 held fixed, pearson"]["estimate"] == pytest.approx(expected, abs=1e-10)
    assert found["direct, pearson"]["pairs"] == 10


def test_newcomers_are_flagged() -> None:
    inside = [made.dataset([{1, 2, 3}, {2, 4}], 20, "a"), made.dataset([{1, 3}, {4}], 20, "b")]
    outside = made.dataset([{10, 11}, {12, 3}], 20, "c")
    result = overlap_of([*inside, outside], newcomer=0.4)
    assert result.data["stand_alone"] == ["c"]
    assert result.data["covered_by_others"]["c"] == pytest.approx(1 / 4)
    assert any("c shares little" in note for note in result.notes)


def test_bad_input_is_one_sentence() -> None:
    several = suite()
    with pytest.raises(InputError, match="at least 2 datasets"):
        overlap_of(several[:1])
    with pytest.raises(InputError, match="none of"):
        overlap_of(several, general="x")
    with pytest.raises(InputError, match="at least 4 models"):
        overlap_of(suite(models=3))

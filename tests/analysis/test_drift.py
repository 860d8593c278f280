"""Drift against exact tests one by one, all splits, and all pairs."""

from __future__ import annotations

from itertools import combinations

import made
import numpy as np
import pytest
from scipy import stats

from qwen_scope.analysis import distance, distance_test, drift_of, near_duplicates, paired_tests, rate_tests
from qwen_scope.errors import InputError, MismatchError
from qwen_scope.stats import rate_difference, wilson


def test_rate_tests_are_fishers() -> None:
    a, b = np.array([0, 3, 10, 7]), np.array([0, 9, 2, 7])
    found = rate_tests(a, 12, b, 15)
    for i in range(4):
        table = [[a[i], 12 - a[i]], [b[i], 15 - b[i]]]
        tails = [stats.fisher_exact(table, alternative=side).pvalue for side in ("less", "greater")]
        assert found[i] == pytest.approx(min(1, 2 * min(tails)), abs=1e-12)


def test_paired_tests_are_mcnemars() -> None:
    before, after = made.random_sets(30, 8, 0), made.random_sets(30, 8, 1)
    found = paired_tests(made.dataset(before, 8), made.dataset(after, 8))
    for f in range(8):
        gone = sum(f in x and f not in y for x, y in zip(before, after, strict=True))
        come = sum(f in y and f not in x for x, y in zip(before, after, strict=True))
        expected = stats.binomtest(gone, gone + come).pvalue if gone + come else 1.0
        assert found[f] == pytest.approx(expected, abs=1e-12)


def test_distance_test_equals_all_splits() -> None:
    sets = made.random_sets(8, 10, 3)
    a, b = made.dataset(sets[:4], 10), made.dataset(sets[4:], 10, "b")

    def apart(chosen: tuple[int, ...]) -> float:
        rates = [
            np.mean([[f in sets[i] for f in range(10)] for i in side], axis=0)
            for side in (chosen, [i for i in range(8) if i not in chosen])
        ]
        return float(np.abs(rates[0] - rates[1]).sum() / (rates[0] + rates[1]).sum())

    every = np.array([apart(chosen) for chosen in combinations(range(8), 4)])
    found = distance_test(a, b, 4000, seed=0)
    assert found.found == pytest.approx(apart((0, 1, 2, 3)), abs=1e-12)
    assert found.found == pytest.approx(float(distance(a.rates(), b.rates())))
    assert found.mean == pytest.approx(every.mean(), abs=0.01)
    assert found.p == pytest.approx((every >= found.found - 1e-12).mean(), abs=0.03)


def test_differences_have_newcombes_interval() -> None:
    # Newcombe (1998), table II: 56/70 against 48/80.
    value, low, high = rate_difference(56, 70, 48, 80)
    assert (float(value), float(low), float(high)) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    low, high = wilson(81, 263)
    assert (float(low), float(high)) == pytest.approx((0.2553, 0.3662), abs=1e-4)


@pytest.mark.parametrize("jaccard", [0.4, 0.75, 1.0])
def test_near_duplicates_equal_all_pairs(jaccard: float) -> None:
    a, b = made.random_sets(40, 25, 5, 0.2), made.random_sets(30, 25, 6, 0.2)
    b[3], b[7] = set(a[5]), a[9] | {24}
    i, j, similar = near_duplicates(made.dataset(a, 25), made.dataset(b, 25, "b"), jaccard)
    expected = {
        (x, y): len(p & q) / len(p | q)
        for x, p in enumerate(a)
        for y, q in enumerate(b)
        if len(p & q) >= jaccard * len(p | q) - 1e-9
    }
    assert dict(zip(zip(i.tolist(), j.tolist(), strict=True), similar.tolist(), strict=True)) == pytest.approx(expected)
    assert (5, 3) in expected


@pytest.mark.parametrize("jaccard", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("seed", range(4))
def test_no_changed_copy_is_missed(seed: int, jaccard: float) -> None:
    """Copies with some features taken out and others put in lie on both sides of every bound of the filters."""
    rng, a = np.random.default_rng(seed), made.random_sets(60, 40, seed, 0.35)
    b = [one ^ set(rng.choice(40, rng.integers(0, 9), replace=False).tolist()) for one in a]
    i, j, similar = near_duplicates(made.dataset(a, 40), made.dataset(b, 40, "b"), jaccard)
    expected = {
        (x, y): len(p & q) / len(p | q)
        for x, p in enumerate(a)
        for y, q in enumerate(b)
        if p | q and len(p & q) >= jaccard * len(p | q) - 1e-9
    }
    assert dict(zip(zip(i.tolist(), j.tolist(), strict=True), similar.tolist(), strict=True)) == pytest.approx(expected)


def test_the_analysis_finds_what_moved_and_what_leaks() -> None:
    a, b = made.random_sets(80, 30, 1, 0.2), made.random_sets(80, 30, 2, 0.2)
    b = [(s | {4}) - {9} for s in b]
    b[0] = set(a[11])
    texts = tuple(f"text {i}" for i in range(80))
    result = drift_of([made.dataset(a, 30), made.dataset(b, 30, "b", texts=texts)], shuffles=100)
    first = result.data["features"][0]
    assert first["feature"] == 4
    assert first["low"] <= first["difference"] <= first["high"]
    assert first["examples"][0]["dataset"] == "b"
    assert first["examples"][0]["text"].startswith("text")
    assert result.data["distance"]["p"] < 0.02
    assert {"a": "a11", "b": "b0", "jaccard": 1.0} in result.data["near_duplicates"]
    assert "leaks" in result.notes[0]


def test_no_difference_is_said() -> None:
    sets = made.random_sets(120, 30, 1, 0.2)
    result = drift_of([made.dataset(sets[:60], 30), made.dataset(sets[60:], 30, "b")], shuffles=200, near=1.0)
    assert result.data["different"] == 0
    assert result.data["distance"]["p"] > 0.05
    assert [table.title for table in result.tables] == ["Drift"], "what does not pass is no finding"
    assert "no feature differs" in result.figures[0].title
    assert f"none of the {result.data['tested']} tested passes" in result.notes[0]
    assert len(result.data["features"]) == 20, "the data keep the rows with their p"
    assert not any(row["differs"] for row in result.data["features"])


@pytest.mark.parametrize("moved", [1, 2, 5])
def test_only_what_passes_the_level_is_shown(moved: int) -> None:
    sets = made.random_sets(160, 30, 1, 0.2)
    a, b = sets[:80], [s | set(range(moved)) for s in sets[80:]]
    result = drift_of([made.dataset(a, 30), made.dataset(b, 30, "b")], shuffles=50)
    (features,) = [table for table in result.tables if table.title == "Features that differ"]
    assert {row[0] for row in features.rows} == set(range(moved))
    assert all(row[5] <= 0.05 for row in features.rows)
    assert "differ most" in result.figures[0].title
    assert len(result.data["features"]) == 20
    strict = drift_of([made.dataset(a, 30), made.dataset(b, 30, "b")], shuffles=50, level=1e-40)
    assert [table.title for table in strict.tables] == ["Drift"]


def test_paired_drift() -> None:
    sets = made.random_sets(60, 20, 1, 0.2)
    moved = [s | {7} for s in sets]
    one, two = made.dataset(sets, 20, "a"), made.dataset(moved, 20, "a")
    two = type(two)(**{**vars(two), "name": "later"})
    result = drift_of([one, two], paired=True, shuffles=100)
    assert result.data["different"] == 1
    assert result.data["features"][0]["feature"] == 7
    with pytest.raises(MismatchError, match="not paired"):
        drift_of([one, made.dataset(sets, 20, "b")], paired=True)


def test_bad_input_is_one_sentence() -> None:
    several = [made.dataset([{1}], name=name) for name in "abc"]
    with pytest.raises(InputError, match="two datasets, not 3"):
        drift_of(several)
    with pytest.raises(InputError, match="--near"):
        drift_of(several[:2], near=0)
    with pytest.raises(InputError, match="shuffle"):
        drift_of(several[:2], shuffles=0)

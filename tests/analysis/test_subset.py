"""Lazy greedy against greedy that looks at everything, its guarantee against all subsets."""

from __future__ import annotations

from itertools import combinations

import made
import numpy as np
import pytest
from scipy import stats

from qwen_scope.analysis import greedy, subset_of
from qwen_scope.errors import InputError


def plain_greedy(sets: list[set[int]], share: float) -> list[int]:
    goal, covered, chosen = share * len(set().union(*sets)), set(), []
    while len(covered) < goal - 1e-9:
        best = max(range(len(sets)), key=lambda i: (len(sets[i] - covered), -i))
        covered |= sets[best]
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_lazy_equals_plain(seed: int, share: float) -> None:
    sets = made.random_sets(25, 40, seed, 0.08)
    chosen, gains = greedy(made.dataset(sets, 40), share)
    assert chosen == plain_greedy(sets, share)
    assert sum(gains) == len(set().union(*(sets[i] for i in chosen)))


@pytest.mark.parametrize("seed", range(5))
def test_the_guarantee_holds_against_all_subsets(seed: int) -> None:
    sets = made.random_sets(9, 30, seed, 0.15)
    _, gains = greedy(made.dataset(sets, 30), 1.0)
    for n in range(1, len(gains) + 1):
        best = max(len(set().union(*(sets[i] for i in c))) for c in combinations(range(9), n))
        assert sum(gains[:n]) >= (1 - 1 / np.e) * best


def test_the_analysis_says_what_is_kept() -> None:
    rng = np.random.default_rng(0)
    scores = (rng.random((40, 6)) < np.linspace(0.2, 0.8, 6)).astype(float)
    data = made.dataset(made.random_sets(40, 60, 1, 0.05), 60, scores=scores)
    found = subset_of([data], share=0.8, draws=50).data["a"]
    chosen = [int(name[1:]) for name in found["ids"]]
    assert found["share"] >= 0.8
    assert found["random_share"] < found["share"]
    assert found["random_needs"] > found["chosen"]
    tau = stats.kendalltau(scores.mean(0).round(9), scores[chosen].mean(0).round(9)).statistic
    assert found["kendall"]["chosen"] == pytest.approx(tau, abs=1e-12)
    assert found["kendall"]["low"] <= found["kendall"]["random"] <= found["kendall"]["high"]


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(InputError, match="share of the footprint"):
        subset_of([made.dataset([{1}])], share=1.5)
    with pytest.raises(InputError, match="no feature fires"):
        greedy(made.dataset([set()]))

"""A few items that keep most of a dataset's footprint."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from qwen_scope.errors import InputError, check_count, check_share
from qwen_scope.report import Curves, Line, thinned
from qwen_scope.stats import kendall

from .dataset import Dataset, check_together
from .redundancy import expected_coverage
from .result import Result, Table


def greedy(dataset: Dataset, share: float = 1.0) -> tuple[list[int], list[int]]:
    """Items by greedy choice until a share of the footprint is covered, and how many features each of them added.

    Each step takes the item that adds most, the first of equals. What n steps cover is at least `1 - 1/e` of what any n
    items can cover (Nemhauser, Wolsey and Fisher 1978). An item's gain can only shrink, so an old gain is a bound and
    only items at the top are looked at again (Minoux 1978): the choice is the same as looking at all.

    Raises:
        InputError: a share that is not in (0, 1], or no firing at all.
    """
    check_share("a share of the footprint", share)
    start = np.searchsorted(dataset.item, np.arange(len(dataset) + 1))
    goal = share * int((dataset.counts() > 0).sum())
    if goal == 0:
        raise InputError(f"no feature fires on any item of {dataset.name}")
    new = np.ones(dataset.width, dtype=bool)
    bounds = [(-int(n), i) for i, n in enumerate(np.diff(start))]
    heapq.heapify(bounds)
    chosen, gains, covered = [], [], 0
    while covered < goal - 1e-9:
        _, item = heapq.heappop(bounds)
        own = dataset.feature[start[item] : start[item + 1]]
        gain = int(new[own].sum())
        if bounds and (-gain, item) > bounds[0]:
            heapq.heappush(bounds, (-gain, item))
            continue
        new[own] = False
        chosen.append(item)
        gains.append(gain)
        covered += gain
    return chosen, gains


def subset_of(
    datasets: Sequence[Dataset],
    *,
    share: Annotated[float, "The share of the footprint to keep."] = 0.95,
    draws: Annotated[int, "Random subsets of the same size to compare rankings with."] = 200,
    seed: Annotated[int, "Of the random subsets."] = 0,
) -> Result:
    """The few items that keep a share of the footprint; with scores, whether they still rank the models.

    Raises:
        InputError, MismatchError: a share that makes no sense, or datasets that do not belong together.
    """
    check_together(datasets)
    check_count("--draws", draws)
    data: dict[str, Any] = {}
    rows, lines = [], []
    for dataset in datasets:
        chosen, gains = greedy(dataset, share)
        exact = expected_coverage(dataset.counts(), len(dataset))
        n = len(chosen)
        kept = np.cumsum(gains) / exact.footprint
        one: dict[str, Any] = {
            "items": len(dataset),
            "chosen": n,
            "ids": [dataset.ids[i] for i in chosen],
            "share": float(kept[-1]),
            "random_share": float(exact.curve[n - 1]),
            "random_needs": int(np.searchsorted(exact.curve, kept[-1] - 1e-12)) + 1,
        }
        row: tuple = (dataset.name, len(dataset), n, one["share"], one["random_share"], one["random_needs"])
        if dataset.scores is not None:
            one["kendall"] = tau = kept_ranking(dataset, chosen, draws, seed)
            row += (tau["chosen"], f"{tau['random']:.3f} ({tau['low']:.3f} to {tau['high']:.3f})")
        data[dataset.name] = one
        rows.append(row)
        at = thinned(n)
        lines.append(Line(dataset.name, [i + 1 for i in at], kept[at].tolist()))
    scored = all(d.scores is not None for d in datasets)
    columns = ("dataset", "items", "chosen", "share kept", "random items keep", "random items needed")
    columns += ("Kendall tau", "of random subsets") if scored else ()
    tables = (Table(f"Subsets that keep {share:.0%} of the footprint", columns, [r[: len(columns)] for r in rows]),)
    return Result(data, tables, (Curves("Footprint kept by greedy choice", "items", "share", lines, log_x=True),))


def kept_ranking(dataset: Dataset, chosen: Sequence[int], draws: int, seed: int) -> dict[str, float]:
    """Kendall's tau between the chosen items and all of them, and between random subsets of that size and all."""
    assert dataset.scores is not None
    values, rng = dataset.scores.values, np.random.default_rng(seed)
    parts = [np.asarray(chosen), *(rng.choice(len(values), len(chosen), replace=False) for _ in range(draws))]
    tau = kendall(values.mean(0).round(9), np.stack([values[part].mean(0) for part in parts]).round(9))
    low, middle, high = np.quantile(tau[1:], [0.025, 0.5, 0.975]) if draws else [math.nan] * 3
    return {"chosen": float(tau[0]), "random": float(middle), "low": float(low), "high": float(high)}

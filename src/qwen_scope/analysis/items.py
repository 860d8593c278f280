"""Each item of a dataset beside the others: what it alone holds, which others are its like, and which are enough."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from qwen_scope.errors import InputError, check_share

from .dataset import Dataset
from .near import near_duplicates


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


def redundant_items(dataset: Dataset, jaccard: float) -> list[dict[str, Any]]:
    """A row per item: its features, those that fire on no other item, the item most like it, and whether the dataset
    keeps its whole footprint without it.

    `redundant` items can be left out all at once: the greedy choice of items (`greedy`) that covers the footprint does
    without them. `twin` is another item whose set of features has at least the Jaccard similarity `jaccard`.

    Raises:
        InputError: a similarity that is no share, or no firing at all.
    """
    chosen, _ = greedy(dataset)
    counts, n = dataset.counts(), len(dataset)
    features = np.bincount(dataset.item, minlength=n)
    alone = np.bincount(dataset.item, counts[dataset.feature] == 1, minlength=n).astype(int)
    twins: dict[int, tuple[int, float]] = {}
    for a, b, similar in zip(*(part.tolist() for part in near_duplicates(dataset, dataset, jaccard)), strict=True):
        if a != b:  # the most similar come first
            twins.setdefault(a, (b, similar))
    needed = set(chosen)
    return [
        {
            "dataset": dataset.name,
            "id": dataset.ids[i],
            "features": int(features[i]),
            "only_here": int(alone[i]),
            "redundant": i not in needed,
            "twin": dataset.ids[twins[i][0]] if i in twins else None,
            "similarity": twins[i][1] if i in twins else None,
        }
        for i in range(n)
    ]

"""Pairs of items with nearly the same features: how a test item that leaked into training looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from qwen_scope.errors import check_share

from .dataset import Dataset

Pairs = tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"], Float64[np.ndarray, " pairs"]]
BLOCK = 2048


def near_duplicates(a: Dataset, b: Dataset, jaccard: float) -> Pairs:
    """Pairs (item of a, item of b) whose sets of features have at least this Jaccard similarity, and the similarity.

    Two sets as similar as J share one of the `|x| - ceil(J |x|) + 1` rarest features of each (prefix filtering, Bayardo
    et al. 2007), and so many of them that with all that follow in the set whose rarest end first they can reach
    `J / (1 + J) (|x| + |y|)` (after the positional filter of Xiao et al. 2008). Only pairs that do are counted out.
    Nothing is missed.
    """
    check_share("a Jaccard similarity", jaccard)
    order = np.argsort(np.argsort(a.counts() + b.counts(), kind="stable"))
    left, right = prefixes(a, order, jaccard), prefixes(b, order, jaccard)
    columns = right.matrix.T.tocsc()
    whole_a, whole_b = a.matrix().tocsr(), b.matrix().tocsr()
    size_a, size_b = np.diff(whole_a.indptr), np.diff(whole_b.indptr)
    found: list[Pairs] = []
    for start in range(0, len(a), BLOCK):
        candidates = (left.matrix[start : start + BLOCK] @ columns).tocoo()
        i, j = candidates.coords[0] + start, candidates.coords[1]
        most = candidates.data + np.where(left.last[i] <= right.last[j], left.rest[i], right.rest[j])
        like = most >= jaccard / (1 + jaccard) * (size_a[i] + size_b[j]) - 1e-9
        i, j = i[like], j[like]
        both = np.concatenate(
            [shared(whole_a, whole_b, i[k : k + BLOCK], j[k : k + BLOCK]) for k in range(0, len(i), BLOCK)]
            or [np.zeros(0)]
        )
        similar = both / np.maximum(size_a[i] + size_b[j] - both, 1)
        keep = similar >= jaccard - 1e-9
        found.append((i[keep].astype(np.int64), j[keep].astype(np.int64), similar[keep].astype(np.float64)))
    i, j, similar = (np.concatenate(part) for part in zip(*found, strict=True))
    rank = np.lexsort((j, i, -similar))
    return i[rank], j[rank], similar[rank]


def shared(a: Any, b: Any, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """How many features the items of each pair share."""
    return np.asarray((a[i] * b[j]).sum(1)).ravel()


@dataclass(frozen=True, eq=False)
class Prefixes:
    """The rarest features of every item, as many as the filter needs.

    Attributes:
        matrix: `(items, width)`, sparse.
        last: by item, the rank of the commonest of them.   rest: by item, how many features it has beside them.
    """

    matrix: Any
    last: Int64[np.ndarray, " items"]
    rest: Int64[np.ndarray, " items"]


def prefixes(dataset: Dataset, order: np.ndarray, jaccard: float) -> Prefixes:
    """What the filter reads of every item.

    Args:
        order: the rank of every feature, the rarest first.
    """
    from scipy.sparse import csr_array

    by_rarity = np.lexsort((order[dataset.feature], dataset.item))
    item, feature = dataset.item[by_rarity], dataset.feature[by_rarity]
    start = np.searchsorted(item, np.arange(len(dataset) + 1))
    size = np.diff(start)
    wanted = np.minimum(size, size - np.ceil(jaccard * size - 1e-9).astype(int) + 1)
    keep = np.arange(len(item)) - start[item] < wanted[item]
    ones = np.ones(int(keep.sum()), np.float32)
    last = np.full(len(dataset), -1)
    last[item[keep]] = order[feature[keep]]  # of several the last stays, which is the commonest
    matrix = csr_array((ones, (item[keep], feature[keep])), shape=(len(dataset), dataset.width))
    return Prefixes(matrix, last, size - wanted)

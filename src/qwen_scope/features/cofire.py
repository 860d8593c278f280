"""The features of another dictionary that fire on the same tokens as one's own, counted sparsely, in tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from qwen_scope.errors import MismatchError
from qwen_scope.sae import FeatureActs

from .nearest import NONE, Best

# Features whose counts are in memory at once: each holds at most as many as features of the other side fire with it.
ROWS = 512


def fired(acts: FeatureActs) -> Any:
    """Which feature fires on which token, a sparse array `(tokens, d_sae)` of ones, row by row."""
    from scipy.sparse import csr_array

    flat = acts.reshape(-1)
    on = (flat.values > 0).cpu().numpy()
    ends = np.concatenate([[0], np.cumsum(on.sum(1))])
    # int64 wherever counts are summed; indices fit into int32 by the type of FeatureActs.
    columns = flat.indices.cpu().numpy()[on]
    return csr_array((np.ones(len(columns), np.int64), columns, ends), shape=(len(on), acts.width))


def check_same_tokens(a: FeatureActs, b: FeatureActs) -> None:
    """Raise MismatchError unless both are of as many tokens."""
    if a.shape.numel() != b.shape.numel():
        raise MismatchError(
            f"the activations are of {a.shape.numel()} and {b.shape.numel()} tokens; co-firing needs the same"
        )


def cofired(
    a: Any,
    b: Any,
    features: Int64[np.ndarray, " n"],
    tell: Callable[[float], None] | None = None,
) -> tuple[Best, Best]:
    """The highest Jaccard index of tokens, `both / (a + b - both)`, of some features of `a` with one of `b`, and of
    every feature of `b` with one of those."""
    per_b = np.asarray(b.sum(0), np.int64).ravel()
    mine = a.tocsc()
    partner, score = np.full(len(features), NONE, np.int64), np.zeros(len(features))
    back, back_score = np.full(b.shape[1], NONE, np.int64), np.zeros(b.shape[1])
    for at in range(0, len(features), ROWS):
        some = features[at : at + ROWS]
        columns = mine[:, some]
        both = (columns.T.tocsr() @ b).tocsr()
        both.sort_indices()
        per_a = np.diff(columns.indptr)
        rows = np.repeat(np.arange(len(some)), np.diff(both.indptr))
        jaccard = both.data / (per_a[rows] + per_b[both.indices] - both.data)
        # The lower partner of equals: the last written wins, so the order is ascending score, descending partner.
        order = np.lexsort((-both.indices, jaccard))
        partner[at + rows[order]], score[at + rows[order]] = both.indices[order], jaccard[order]
        order = np.lexsort((-rows, jaccard))
        best, row = np.zeros(b.shape[1]), np.zeros(b.shape[1], np.int64)
        best[both.indices[order]], row[both.indices[order]] = jaccard[order], rows[order]
        more = best > back_score
        back[more], back_score[more] = some[row[more]], best[more]
        if tell is not None:
            tell(min(1.0, (at + ROWS) / len(features)))
    return Best(partner, score), Best(back, back_score)


def chance_cofirings(
    a: Any, b: Any, features: Int64[np.ndarray, " sample"], draws: int, seed: int
) -> Float[np.ndarray, "draws sample"]:
    """The highest Jaccard index of some features of `a` with one of `b` where `b`'s tokens stand in a random order."""
    rng = np.random.default_rng(seed)
    rows = [cofired(a, b[rng.permutation(b.shape[0])], features)[0].score for _ in range(draws)]
    return np.stack(rows)

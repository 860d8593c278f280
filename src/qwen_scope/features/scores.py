"""How well each feature of a layer tells documents apart: what `find` ranks by on the half that chooses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, Shaped
from scipy import stats as scipy_stats

from qwen_scope.stats import auroc, rank_test

from .options import By
from .pooled import Pooled

FOLDS, REPEATS, DRAWS = 5, 4, 200

# Numbers (documents times features) that are worked on at once.
BLOCK = 2**23


@dataclass(frozen=True, eq=False)
class Scores:
    """One number per feature of a layer under one reduction, for the features that fire at all."""

    layer: int
    reduction: str
    features: Int64[np.ndarray, " firing"]
    p: Float[np.ndarray, " firing"]
    rises: Bool[np.ndarray, " firing"]
    f1: Float[np.ndarray, " firing"]
    threshold: Float[np.ndarray, " firing"]
    separation: Float[np.ndarray, " firing"]
    difference: Float[np.ndarray, " firing"]
    rate: Float[np.ndarray, " firing"]
    auroc: Float[np.ndarray, " firing"]


def score(
    positive: Pooled,
    negative: Pooled,
    reduction: str,
    discovery_p: Int64[np.ndarray, " a"],
    discovery_n: Int64[np.ndarray, " b"],
) -> Scores:
    """Every feature that fires in either set, under one reduction; the halves named choose, all documents test."""
    features = np.union1d(positive.firing(), negative.firing()).astype(np.int64)
    columns: list[list[np.ndarray]] = [[] for _ in range(8)]
    for some in blocks(features, positive.documents + negative.documents):
        a, b = positive.values(reduction, some), negative.values(reduction, some)
        here_a, here_b = a[discovery_p], b[discovery_n]
        f1, threshold = best_f1(here_a, here_b)
        apart = here_a.mean(0) - here_b.mean(0)
        spread = np.sqrt(here_a.var(0) + here_b.var(0)) + 1e-9
        rate = (here_a > 0).mean(0) - (here_b > 0).mean(0)
        rises = auroc(a, b) > 0.5
        parts = (rank_test(a, b), rises, f1, threshold, apart / spread, apart, rate, auroc(here_a, here_b))
        for column, part in zip(columns, parts, strict=True):
            column.append(part)
    empty = np.zeros(0)
    p, rises, *rest = (np.concatenate(column) if column else empty for column in columns)
    return Scores(positive.layer, reduction, features, p, rises.astype(bool), *rest)


def best(scores: Sequence[Scores], by: By, n: int) -> list[tuple[int, int]]:
    """The `n` best features as (which scores, which of its features), each feature once."""
    if not scores:
        return []
    which = np.repeat(np.arange(len(scores)), [len(one.features) for one in scores])
    at = np.concatenate([np.arange(len(one.features)) for one in scores])

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(one, name) for one in scores])

    first = column("f1").round(2) if by == "f1" else column(by)
    order = np.lexsort((at, which, -column("separation"), -first))
    chosen: dict[tuple[int, int], tuple[int, int]] = {}
    for i in order.tolist():
        one = scores[int(which[i])]
        chosen.setdefault((one.layer, int(one.features[at[i]])), (int(which[i]), int(at[i])))
        if len(chosen) == n:
            break
    return list(chosen.values())


def best_f1(
    positive: Float32[np.ndarray, "a features"], negative: Float32[np.ndarray, "b features"]
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]:
    """Per feature the best F1 of calling documents above a threshold positive, and that threshold.

    A threshold lies halfway between two neighbouring values and never below 0: a feature that is silent says nothing.
    """
    values = np.concatenate([positive, negative])
    order = np.argsort(-values, axis=0, kind="stable")
    ranked = np.take_along_axis(values, order, axis=0)
    hits = np.cumsum(order < len(positive), axis=0)
    called = np.arange(1, len(values) + 1)[:, None]
    f1 = 2 * hits / (called + len(positive))
    below = np.concatenate([ranked[1:], np.zeros((1, ranked.shape[1]), ranked.dtype)])
    f1[ranked <= below] = 0.0
    cut = f1.argmax(0)[None]
    low, high = (np.take_along_axis(some, cut, axis=0)[0].astype(np.float64) for some in (below, ranked))
    return np.take_along_axis(f1, cut, axis=0)[0], np.where(low > 0, (low + high) / 2, 0.0)


def validated_f1(
    positive: Float32[np.ndarray, "a features"], negative: Float32[np.ndarray, "b features"], seed: int
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]:
    """Per feature F1 where each document is called by a threshold chosen without it, over repeated folds; and its
    standard error, by bootstrap over the documents.

    Many features part a few dozen documents without a fault; this tells those that barely do from those that do.
    """
    rng = np.random.default_rng(seed)
    values, y = np.concatenate([positive, negative]), np.repeat([True, False], [len(positive), len(negative)])
    called = np.zeros(values.shape)
    for _ in range(REPEATS):
        # Folds hold like shares of both sets.
        fold = np.concatenate([rng.permutation(len(side)) % FOLDS for side in (positive, negative)])
        for number in np.unique(fold):
            rest, here = fold != number, fold == number
            if (rest & y).any() and (rest & ~y).any():
                called[here] += values[here] > best_f1(values[rest & y], values[rest & ~y])[1]
    called /= REPEATS
    drawn = [rng.multinomial(n, np.full(n, 1 / n), size=DRAWS) for n in (len(positive), len(negative))]
    hits, false = drawn[0] @ called[y], drawn[1] @ called[~y]
    return f1_of_calls(called[y], called[~y], axis=0), (2 * hits / (hits + false + len(positive))).std(0)


def one_error_rule(
    f1: Float[np.ndarray, " n"], error: Float[np.ndarray, " n"], separation: Float[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """An order, best first: those within one standard error of the best F1 by separation, then the others by F1.

    With a few dozen documents a difference of one or two of them says little, and the luckiest of thousands of features
    looks best (Breiman et al. 1984 choose among trees in this way).
    """
    best = int(np.lexsort((-separation, -f1))[0])
    close = f1 >= f1[best] - error[best]
    return np.lexsort((-separation, np.where(close, 0.0, -f1), ~close)).astype(np.int64)


def f1_of_calls(positive: Shaped[np.ndarray, ...], negative: Shaped[np.ndarray, ...], axis: int = -1) -> np.ndarray:
    """F1 where 1 means called positive: `2 TP / (2 TP + FP + FN)`."""
    hits, false = positive.sum(axis), negative.sum(axis)
    return np.asarray(2 * hits / (hits + false + positive.shape[axis]))


def auroc_of(positive: Shaped[np.ndarray, ...], negative: Shaped[np.ndarray, ...], axis: int = -1) -> np.ndarray:
    """AUROC over an axis, as the bootstrap asks for it."""
    n, m = positive.shape[axis], negative.shape[axis]
    ranks = scipy_stats.rankdata(np.concatenate([positive, negative], axis=axis), axis=axis)
    return np.asarray((ranks.take(np.arange(n), axis).sum(axis) - n * (n + 1) / 2) / (n * m))


def blocks(features: Int64[np.ndarray, " n"], documents: int) -> Iterator[np.ndarray]:
    """Features in groups whose dense table of documents stays small."""
    size = max(1, BLOCK // max(1, documents))
    for start in range(0, len(features), size):
        yield features[start : start + size]

"""Which features fire otherwise on another checkpoint: differences by document, summed as they come, and tested."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from qwen_scope.sae import FeatureActs
from qwen_scope.stats import benjamini_hochberg, ratio_test

from .parallel import Ranks

LEVEL, SHOWN, LEAST_DOCUMENTS = 0.05, 10, 5
KINDS = ("rate", "amount")


@dataclass(frozen=True)
class Move:
    """One feature on the same tokens of two checkpoints.

    Attributes:
        rate_base, rate_post: the share of tokens that it fires on.
        mean_base, mean_post: its mean activation over all tokens.
        q_rate, q_mean: p-values of the two differences, adjusted over all features and both measures.
    """

    feature: int
    rate_base: float
    rate_post: float
    mean_base: float
    mean_post: float
    q_rate: float
    q_mean: float


@dataclass(frozen=True)
class Moves:
    """Which features move.

    Attributes:
        tested: features that fire in at least 5 documents on one of the checkpoints, and so were tested.
        moved: of them those with a q-value of at most 0.05.
        features: of these the ones whose rate changes most, the largest change first.
    """

    tested: int
    moved: int
    features: tuple[Move, ...]


class MoveSums:
    """Sums over documents of what one layer's features do; every call of `add` brings whole documents."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.n = self.n_squared = 0.0
        self.clusters = 0
        shape = (len(KINDS), d_sae)
        self.base, self.post = np.zeros(shape), np.zeros(shape)
        self.squares, self.with_sizes = np.zeros(shape), np.zeros(shape)
        self.documents = np.zeros(d_sae, np.int64)

    def add(self, base: FeatureActs, post: FeatureActs, documents: Tensor) -> None:
        """Activations of some tokens, `(n, k)` slots, and the number of each one's document, `(n,)`."""
        numbers, place = documents.unique(return_inverse=True)
        sizes = np.bincount(place.numpy(), minlength=len(numbers)).astype(np.float64)
        keys, amounts = zip(*(self.cells(acts, place) for acts in (base, post)), strict=True)
        # Only cells (document, feature) in which something fires: all of them together would not fit.
        known, cell = np.unique(np.concatenate(keys), return_inverse=True)
        feature, document = known % self.d_sae, known // self.d_sae
        of_base, of_post = cell[: len(keys[0])], cell[len(keys[0]) :]
        for at, kind in enumerate(KINDS):
            weights = (None, None) if kind == "rate" else amounts
            one, other = (
                np.bincount(of, weight, minlength=len(known)).astype(np.float64)
                for of, weight in zip((of_base, of_post), weights, strict=True)
            )
            for total, values in (
                (self.base, one),
                (self.post, other),
                (self.squares, (other - one) ** 2),
                (self.with_sizes, (other - one) * sizes[document]),
            ):
                total[at] += np.bincount(feature, values, minlength=self.d_sae)
        self.documents += np.bincount(feature, minlength=self.d_sae)
        self.n, self.n_squared = self.n + sizes.sum(), self.n_squared + float((sizes**2).sum())
        self.clusters += len(numbers)

    def over(self, ranks: Ranks) -> None:
        """Become those of all ranks."""
        for name in ("base", "post", "squares", "with_sizes", "documents"):
            setattr(self, name, ranks.sum_of(getattr(self, name)))
        self.n, self.n_squared = ranks.sum_of(np.array([self.n, self.n_squared])).tolist()
        self.clusters = ranks.totals({"clusters": self.clusters})["clusters"]

    def cells(self, acts: FeatureActs, place: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Of every firing the number of its document and feature together, and its activation."""
        on = acts.values > 0
        return (place[:, None] * self.d_sae + acts.indices.long())[on].numpy(), acts.values[on].double().numpy()

    def result(self, shown: int = SHOWN) -> Moves:
        """The tests, and the features that move most."""
        tested = np.flatnonzero(self.documents >= LEAST_DOCUMENTS)
        if self.clusters < 2 or not len(tested):
            return Moves(0, 0, ())
        change = self.post - self.base
        p = np.stack([
            ratio_test(change[at], self.squares[at], self.with_sizes[at], self.n, self.n_squared, self.clusters)
            for at in range(len(KINDS))
        ])  # fmt: skip
        q = benjamini_hochberg(p[:, tested])
        moved = (q <= LEVEL).any(0)
        order = np.lexsort((-np.abs(change[0][tested]), ~moved))[: min(shown, int(moved.sum()))]
        return Moves(len(tested), int(moved.sum()), tuple(self.move(int(tested[i]), q[:, i]) for i in order))

    def move(self, feature: int, q: np.ndarray) -> Move:
        """One feature's figures."""
        rates, means = (
            (float(self.base[at][feature] / self.n), float(self.post[at][feature] / self.n)) for at in range(2)
        )
        return Move(feature, rates[0], rates[1], means[0], means[1], float(q[0]), float(q[1]))

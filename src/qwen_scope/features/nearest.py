"""The nearest decoder column of another dictionary for each of one's own, in tiles, and what chance gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qwen_scope.sae import SAE

NONE = -1
"""In the place of a feature: there is none."""


@dataclass(frozen=True, eq=False)
class Best:
    """Per feature of one side the feature of the other side that scores highest, the lower one of equals.

    Attributes:
        partner: which; `NONE` where there is none.   score: how high, 0 where there is none.
    """

    partner: Int64[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Columns:
    """Decoder columns at unit length, read a few at a time; all stay where they are.

    Attributes:
        sae: whose.   features: which of its columns, in order.
    """

    sae: SAE
    features: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.features)

    def tile(self, start: int, size: int) -> Float[Tensor, "d_model tile"]:
        """Some columns in fp32; one of zeros stays that."""
        some = torch.from_numpy(self.features[start : start + size])
        # A slice of a memory-mapped matrix reads no more than it has to.
        first, last = int(some[0]), int(some[-1])
        run = len(some) == last - first + 1
        whole = self.sae.W_dec[:, first : last + 1] if run else self.sae.W_dec[:, some]
        return torch.nn.functional.normalize(whole.detach().float(), dim=0)


def every_column(sae: SAE) -> Columns:
    """All columns of a dictionary."""
    sae.check_finite("W_dec")
    return Columns(sae, np.arange(sae.d_sae))


def nearest(a: Columns, b: Columns, tile: int, tell: Callable[[float], None] | None = None) -> tuple[Best, Best]:
    """The largest cosine of each column of `a` with one of `b`, and of each of `b` with one of `a`.

    Args:
        tile: columns of each side that are compared at a time: memory holds `tile * (tile + 2 * d_model)` numbers.
        tell: called with the share done.
    """
    there, back = _Running(len(a)), _Running(len(b))
    for at in range(0, len(a), tile):
        mine = a.tile(at, tile)
        for to in range(0, len(b), tile):
            cosines = mine.T @ b.tile(to, tile).to(mine.device)
            there.see(at, to, cosines)
            back.see(to, at, cosines.T)
        if tell is not None:
            tell(min(1.0, (at + tile) / len(a)))
    return there.best(b.features), back.best(a.features)


class _Running:
    """The highest score so far of each row, and where it was."""

    def __init__(self, rows: int) -> None:
        self.score = torch.full((rows,), -torch.inf)
        self.place = torch.full((rows,), NONE)

    def see(self, at: int, to: int, scores: Tensor) -> None:
        """Scores of rows from `at` on with columns from `to` on; tiles come in the order of their columns."""
        value, place = scores.max(dim=1)
        value, place = value.cpu(), place.cpu()
        rows = slice(at, at + len(value))
        more = value > self.score[rows]
        self.score[rows] = torch.where(more, value, self.score[rows])
        self.place[rows] = torch.where(more, place + to, self.place[rows])

    def best(self, names: np.ndarray) -> Best:
        place, score = self.place.numpy(), self.score.double().numpy()
        none = (score == 0) | (place == NONE)  # a column of zeros has no direction
        return Best(np.where(none, NONE, names[place]).astype(np.int64), np.where(none, 0.0, score))


def chance_cosines(
    a: Columns, b: Columns, sample: Int64[np.ndarray, " sample"], draws: int, tile: int, seed: int
) -> Float[np.ndarray, "draws sample"]:
    """The largest cosine of some of `a`'s columns (places in `a`) with those of a shuffled `b`, for each of some draws.

    Shuffled is, along every principal axis of `b`'s columns, which of its columns has which coordinate: their mean and
    covariance stay, what makes a column is gone. It is the permutation of parallel analysis (Horn 1965; Buja and
    Eyuboglu 1992), taken along principal axes; plain random directions would be too easy to beat, because dictionaries
    lie in the few dimensions where residuals vary.
    """
    axes = principal_axes(b, tile)
    chosen = Columns(a.sae, a.features[np.sort(sample)])
    mine = torch.cat([chosen.tile(at, tile) for at in range(0, len(chosen), tile)], dim=1).cpu()
    mine = axes.T @ mine
    rng = np.random.default_rng(seed)
    found = torch.full((draws, len(sample)), -1.0)
    for coordinates in _coordinates(b, axes, tile):
        for draw in range(draws):
            other = torch.nn.functional.normalize(shuffled(coordinates, rng), dim=0)
            for at in range(0, mine.shape[1], tile):
                some = slice(at, at + tile)
                best = (mine[:, some].T @ other).max(dim=1).values
                found[draw, some] = torch.maximum(found[draw, some], best)
    order = np.argsort(np.argsort(sample, kind="stable"), kind="stable")
    return found.double().numpy()[:, order]


def principal_axes(b: Columns, tile: int) -> Float[Tensor, "d_model d_model"]:
    """The eigenvectors of the covariance of unit columns, as columns."""
    width = b.sae.d_model
    total, squares = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for at in range(0, len(b), tile):
        some = b.tile(at, tile).cpu()
        total += some.double().sum(1)
        squares += (some @ some.T).double()
    mean = total / len(b)
    return torch.linalg.eigh(squares / len(b) - torch.outer(mean, mean)).eigenvectors.float()


def _coordinates(b: Columns, axes: Tensor, tile: int) -> Iterator[Tensor]:
    for at in range(0, len(b), tile):
        yield axes.T @ b.tile(at, tile).cpu()


def shuffled(coordinates: Float[Tensor, "axes n"], rng: np.random.Generator) -> Float[Tensor, "axes n"]:
    """Each row in an order of its own: `i` to `(m i + c) mod n`, with `m` drawn among the numbers coprime to `n`."""
    axes, n = coordinates.shape
    steps = np.flatnonzero(np.gcd(np.arange(1, n + 1), n) == 1) + 1
    m, c = rng.choice(steps, axes), rng.integers(n, size=axes)
    order = torch.from_numpy(m)[:, None] * torch.arange(n) + torch.from_numpy(c)[:, None]
    return coordinates.gather(1, order % n)

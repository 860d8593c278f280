"""Matryoshka BatchTopK (Bussmann et al. 2025): the first features must reconstruct on their own.

The choice is BatchTopK's over the whole dictionary; the loss is the mean FVU over nested prefixes of it, so general
features gather at low indices. AuxK works on the error of the whole dictionary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.sae import SAE, JumpReLU

from ..losses import fvu
from ..parallel import Ranks, SumOfSlices
from ..selection import best_of_batch
from ..shape import RunShape
from ..sparse import Active, Decode
from ..weights import Exported, Weights
from .base import Architecture, Batch, Outcome
from .batchtopk import follow_threshold, unknown_threshold, with_one_threshold

# The shares used in the paper's experiments, each twice the one before.
PREFIXES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


@final
@dataclass(frozen=True)
class MatryoshkaTraining(Architecture):
    """BatchTopK with nested dictionaries.

    Attributes:
        prefixes: shares of the dictionary that must each reconstruct on their own, rising to 1.
    """

    name: ClassVar[str] = "matryoshka"
    saved_as: ClassVar[str] = "jumprelu"

    prefixes: tuple[float, ...] = PREFIXES

    def __post_init__(self) -> None:
        shares = self.prefixes
        rising = all(a < b for a, b in zip((0.0, *shares), shares, strict=False))
        if not shares or not rising or not math.isclose(shares[-1], 1.0):
            raise InputError(f"prefixes are rising shares of the dictionary that end with 1, got {shares}")

    def extra(self, shape: RunShape, weights: Weights, x: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        return {"threshold": unknown_threshold(weights)}

    def extra_of(self, shape: RunShape, weights: Weights, sae: SAE) -> dict[str, Tensor]:
        return {"threshold": unknown_threshold(weights)}

    def choose(self, shape: RunShape, weights: Weights, x: Tensor, ranks: Ranks) -> tuple[Tensor, Active]:
        return best_of_batch(x, weights.W_enc, weights.bias(), shape.k, ranks)

    def forward(self, shape: RunShape, weights: Weights, batch: Batch, pre: Tensor, active: Active) -> Outcome:
        ends = [round(share * shape.d_sae) for share in self.prefixes]
        index = active.features + weights.first
        x_hat, losses, start = weights.b_dec.expand_as(batch.x), [], 0
        for end in ends:
            ring = (index >= start) & (index < end)
            inside = Active.of_entries(active.row_of[ring], active.features[ring], active.rows, active.width)
            part = Decode.apply(pre[ring], inside, weights.W_dec)
            x_hat = x_hat + SumOfSlices.apply(part, batch.ranks)
            losses.append(fvu(batch.x, x_hat, batch.variance))
            start = end
        return Outcome(torch.stack(losses).mean(), x_hat, pre)

    def after(self, shape: RunShape, weights: Weights, batch: Batch, outcome: Outcome) -> None:
        follow_threshold(shape, weights, batch, outcome)

    def export(self, weights: Exported, shape: RunShape) -> JumpReLU:
        return with_one_threshold(weights)

"""Matryoshka BatchTopK (Bussmann et al. 2025): the first features must reconstruct on their own.

The choice is BatchTopK's over the whole dictionary; the loss is the mean FVU over nested prefixes of it, so general
features gather at low indices. AuxK works on the error of the whole dictionary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.sae import SAE, JumpReLU

from ..losses import fvu
from ..parallel import Ranks, SumOfSlices
from ..selection import best_of_batch
from ..sparse import Active, Decode
from ..weights import Exported, Weights
from .base import Architecture, Batch, Outcome
from .batchtopk import follow_threshold, unknown_threshold, with_one_threshold

if TYPE_CHECKING:
    from ..config import TrainConfig

# The shares used in the paper's experiments, each twice the one before.
PREFIXES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


@final
class MatryoshkaTraining(Architecture):
    name = "matryoshka"
    options = frozenset({"prefixes"})
    saved_as = "jumprelu"

    def check(self, config: TrainConfig) -> None:
        shares = config.prefixes or PREFIXES
        rising = all(a < b for a, b in zip((0.0, *shares), shares, strict=False))
        if not rising or not math.isclose(shares[-1], 1.0):
            raise InputError(f"prefixes are rising shares of the dictionary that end with 1, got {shares}")

    def extra(self, config: TrainConfig, weights: Weights, x: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        return {"threshold": unknown_threshold(weights)}

    def extra_of(self, config: TrainConfig, weights: Weights, sae: SAE) -> dict[str, Tensor]:
        return {"threshold": unknown_threshold(weights)}

    def choose(self, config: TrainConfig, weights: Weights, x: Tensor, ranks: Ranks) -> tuple[Tensor, Active]:
        return best_of_batch(x, weights.W_enc, weights.bias(), config.k, ranks)

    def forward(self, config: TrainConfig, weights: Weights, batch: Batch, pre: Tensor, active: Active) -> Outcome:
        ends = [round(share * config.d_sae) for share in config.prefixes or PREFIXES]
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

    def after(self, config: TrainConfig, weights: Weights, batch: Batch, outcome: Outcome) -> None:
        follow_threshold(config, weights, batch, outcome)

    def export(self, weights: Exported, config: TrainConfig) -> JumpReLU:
        return with_one_threshold(weights)

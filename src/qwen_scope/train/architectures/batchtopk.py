"""BatchTopK (Bussmann et al. 2024): the `k * n` largest pre-activations of a batch of n tokens.

Inference must not depend on the batch, so the SAE is saved as JumpReLU with one threshold: the running mean of the
smallest activation that was still chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from qwen_scope.sae import SAE, JumpReLU

from ..losses import fvu, reconstruct
from ..parallel import Ranks
from ..selection import best_of_batch
from ..shape import RunShape
from ..sparse import Active
from ..weights import Exported, Weights
from .base import Architecture, Batch, Outcome

# The running mean looks back about a tenth of the run, and not further than a hundred steps.
LONGEST_MEMORY = 100


@final
@dataclass(frozen=True)
class BatchTopKTraining(Architecture):
    name: ClassVar[str] = "batchtopk"
    saved_as: ClassVar[str] = "jumprelu"

    def extra(self, shape: RunShape, weights: Weights, x: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        return {"threshold": unknown_threshold(weights)}

    def extra_of(self, shape: RunShape, weights: Weights, sae: SAE) -> dict[str, Tensor]:
        return {"threshold": unknown_threshold(weights)}

    def choose(self, shape: RunShape, weights: Weights, x: Tensor, ranks: Ranks) -> tuple[Tensor, Active]:
        return best_of_batch(x, weights.W_enc, weights.bias(), shape.k, ranks)

    def forward(self, shape: RunShape, weights: Weights, batch: Batch, pre: Tensor, active: Active) -> Outcome:
        x_hat = reconstruct(weights, pre, active, batch.ranks)
        return Outcome(fvu(batch.x, x_hat, batch.variance), x_hat, pre)

    def after(self, shape: RunShape, weights: Weights, batch: Batch, outcome: Outcome) -> None:
        follow_threshold(shape, weights, batch, outcome)

    def export(self, weights: Exported, shape: RunShape) -> JumpReLU:
        return with_one_threshold(weights)


def unknown_threshold(weights: Weights) -> Tensor:
    """A threshold that the first step will set."""
    return weights.b_enc.new_full((), -1.0)


def smallest_of(values: Tensor) -> Tensor:
    """The smallest value, or infinity where there is none."""
    return values.detach().amin() if len(values) else values.new_full((), torch.inf)


@torch.no_grad()
def follow_threshold(shape: RunShape, weights: Weights, batch: Batch, outcome: Outcome) -> None:
    """Move the running threshold towards the smallest activation of this batch."""
    smallest = batch.ranks.least(smallest_of(outcome.acts))
    threshold = weights.extra["threshold"]
    rate = 1 / max(1, min(LONGEST_MEMORY, shape.steps // 10))
    if smallest.isfinite():
        threshold.add_((smallest - threshold) * (rate if threshold >= 0 else 1.0))


def with_one_threshold(weights: Exported) -> JumpReLU:
    """The same threshold for every feature, in units of the raw residual."""
    threshold = (weights.extra["threshold"].clamp(min=0) / weights.scale).expand(len(weights.tensors["b_enc"]))
    return weights.as_jumprelu(threshold.contiguous())

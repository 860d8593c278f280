"""TopK (Gao et al. 2024): the k largest pre-activations of each token. The released kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from qwen_scope.sae import TopK

from ..losses import fvu, reconstruct
from ..parallel import Ranks
from ..selection import best_of
from ..shape import RunShape
from ..sparse import Active
from ..weights import Exported, Weights
from .base import Architecture, Batch, Outcome


@final
@dataclass(frozen=True)
class TopKTraining(Architecture):
    name: ClassVar[str] = "topk"
    saved_as: ClassVar[str] = "topk"

    def choose(self, shape: RunShape, weights: Weights, x: Tensor, ranks: Ranks) -> tuple[Tensor, Active]:
        return best_of(x, weights.W_enc, weights.bias(), shape.k, ranks)

    def forward(self, shape: RunShape, weights: Weights, batch: Batch, pre: Tensor, active: Active) -> Outcome:
        acts = pre * (pre > 0)
        x_hat = reconstruct(weights, acts, active, batch.ranks)
        return Outcome(fvu(batch.x, x_hat, batch.variance), x_hat, acts)

    def export(self, weights: Exported, shape: RunShape) -> TopK:
        return TopK(
            **weights.tensors,
            k=shape.k,
            hook_point=weights.hook_point,
            identity=weights.identity,
            meta=weights.meta,
        )

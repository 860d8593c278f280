"""TopK (Gao et al. 2024): the k largest pre-activations of each token. The released kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from torch import Tensor

from qwen_scope.sae import TopK

from ..losses import fvu, reconstruct
from ..parallel import Ranks
from ..selection import best_of
from ..sparse import Active
from ..weights import Exported, Weights
from .base import Architecture, Batch, Outcome

if TYPE_CHECKING:
    from ..config import TrainConfig


@final
class TopKTraining(Architecture):
    name = "topk"
    saved_as = "topk"

    def choose(self, config: TrainConfig, weights: Weights, x: Tensor, ranks: Ranks) -> tuple[Tensor, Active]:
        return best_of(x, weights.W_enc, weights.bias(), config.k, ranks)

    def forward(self, config: TrainConfig, weights: Weights, batch: Batch, pre: Tensor, active: Active) -> Outcome:
        acts = pre * (pre > 0)
        x_hat = reconstruct(weights, acts, active, batch.ranks)
        return Outcome(fvu(batch.x, x_hat, batch.variance), x_hat, acts)

    def export(self, weights: Exported, config: TrainConfig) -> TopK:
        return TopK(
            **weights.tensors,
            k=config.k,
            hook_point=weights.hook_point,
            identity=weights.identity,
            meta=weights.meta,
        )

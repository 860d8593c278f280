"""JumpReLU (Rajamanoharan et al. 2024): a trained threshold per feature.

`a = pre * 1[pre > theta]`. The step has no gradient, so within a band of width eps around the threshold the paper's
straight-through estimators stand in: `da/dtheta = -theta / eps` and `dL0/dtheta = -1 / eps`. L0 is drawn to k by
`(L0 / k - 1)**2`. Thresholds are kept as logarithms and start where the first batch has k active features per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from qwen_scope.errors import MismatchError, check_positive
from qwen_scope.sae import SAE, JumpReLU

from ..losses import fvu, reconstruct
from ..parallel import Ranks
from ..selection import above, best_of_batch
from ..shape import RunShape
from ..sparse import Active, sum_by_feature
from ..weights import Exported, Weights
from .base import Architecture, Batch, Outcome
from .batchtopk import smallest_of

SMALLEST = 1e-6


@final
@dataclass(frozen=True)
class JumpReLUTraining(Architecture):
    """A trained threshold per feature.

    Attributes:
        bandwidth: width of the band around a threshold in which it gets gradient, in units of the scaled residual.
        l0_weight: weight of `(L0 / k - 1)**2`.
    """

    name: ClassVar[str] = "jumprelu"
    saved_as: ClassVar[str] = "jumprelu"

    bandwidth: float = 0.1
    l0_weight: float = 0.1

    def __post_init__(self) -> None:
        check_positive("bandwidth", self.bandwidth)
        check_positive("l0_weight", self.l0_weight)

    @torch.no_grad()
    def extra(self, shape: RunShape, weights: Weights, x: Tensor, ranks: Ranks) -> dict[str, Tensor]:
        values, _ = best_of_batch(x, weights.W_enc, weights.bias(), shape.k, ranks)
        start = ranks.least(smallest_of(values)).clamp(min=SMALLEST).log()
        return {"log_threshold": start.expand(weights.d_sae).clone().requires_grad_()}

    def extra_of(self, shape: RunShape, weights: Weights, sae: SAE) -> dict[str, Tensor]:
        if not isinstance(sae, JumpReLU):
            raise MismatchError(f"{sae.identity} has no thresholds to continue from")
        held = sae.threshold[weights.first : weights.first + weights.d_sae].to(weights.b_enc.device, torch.float32)
        return {"log_threshold": (held * weights.scale).clamp(min=SMALLEST).log().requires_grad_()}

    def choose(self, shape: RunShape, weights: Weights, x: Tensor, ranks: Ranks) -> tuple[Tensor, Active]:
        lowest = weights.extra["log_threshold"].exp() - (self.bandwidth) / 2
        return above(x, weights.W_enc, weights.bias(), lowest)

    def forward(self, shape: RunShape, weights: Weights, batch: Batch, pre: Tensor, active: Active) -> Outcome:
        acts, fired = Jump.apply(pre, active, weights.extra["log_threshold"].exp(), self.bandwidth)
        x_hat = reconstruct(weights, acts, active, batch.ranks)
        here = fired.sum() / batch.n
        # The other ranks' share of L0 is a constant here: their own backward carries its gradient.
        l0 = here + (batch.ranks.over_both(here.detach()) - here.detach())
        penalty = self.l0_weight * (l0 / shape.k - 1).square()
        loss = fvu(batch.x, x_hat, batch.variance)
        if batch.ranks.mode == "data":
            # Every rank has the whole penalty's gradient for its own rows; its value must be counted once.
            penalty = penalty - penalty.detach() * (1 - 1 / batch.ranks.world)
        return Outcome(loss + penalty, x_hat, acts)

    def export(self, weights: Exported, shape: RunShape) -> JumpReLU:
        return weights.as_jumprelu(weights.extra["log_threshold"].exp() / weights.scale)


class Jump(torch.autograd.Function):
    """`pre * 1[pre > theta]` and `1[pre > theta]` at the entries, with the paper's estimators for the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, active: Active, theta: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        at = theta[active.features.long()]
        fired = pre > at
        ctx.active, ctx.bandwidth = active, bandwidth
        ctx.save_for_backward(at, fired, (pre - at).abs() < bandwidth / 2)
        return pre * fired, fired.to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        at, fired, near = ctx.saved_tensors
        to_theta = -(grads[0] * at + grads[1]) * near / ctx.bandwidth
        return grads[0] * fired, None, sum_by_feature(to_theta, ctx.active), None

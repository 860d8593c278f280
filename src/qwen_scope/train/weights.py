"""The weights of one SAE while it is trained: how they stay on the sphere, and how they leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qwen_scope.model import HookPoint
from qwen_scope.sae import Identity, JumpReLU, fingerprint

from .parallel import Ranks, gathered

# Random rows drawn at a time, whichever slice of them is kept.
DRAWN_ROWS = 4096


@dataclass(eq=False)
class Weights:
    """One SAE in training, or one rank's slice of it. It reads residuals multiplied by `scale`.

    Attributes:
        W_enc, W_dec: `(d_sae, d_model)`, the decoder with a feature per row.
        b_enc: `(d_sae,)`.   b_dec: `(d_model,)`.
        scale: what residuals are multiplied by before they come here.
        pre_bias: whether the encoder reads `x - b_dec`.
        norms: the norm every decoder row keeps, `(d_sae,)`: 1, or in fine-tuning what it was.
        first: the index of the first feature in the whole dictionary.
        extra: what the architecture adds.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    scale: float
    pre_bias: bool
    norms: Tensor
    first: int = 0
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def d_sae(self) -> int:
        """The number of features held here."""
        return self.W_enc.shape[0]

    @property
    def d_model(self) -> int:
        return self.W_enc.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, as a checkpoint keeps them."""
        named = {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}
        return {**named, "norms": self.norms, **{f"extra.{name}": tensor for name, tensor in self.extra.items()}}

    def parameters(self) -> dict[str, Tensor]:
        """The tensors that are trained, by name."""
        return {name: tensor for name, tensor in self.tensors().items() if tensor.requires_grad}

    @torch.no_grad()
    def bias(self) -> Tensor:
        """The encoder's bias with the pre-bias folded in: `b_enc - W_enc b_dec`, or `b_enc` without one."""
        return self.b_enc - self.W_enc @ self.b_dec if self.pre_bias else self.b_enc.detach()

    @torch.no_grad()
    def drop_parallel_gradient(self) -> None:
        """Remove from the decoder's gradient what would only change the norm of a feature's direction."""
        if self.W_dec.grad is None:
            return
        for grad, row, norm in zip(
            *(t.split(DRAWN_ROWS) for t in (self.W_dec.grad, self.W_dec, self.norms)), strict=True
        ):
            along = torch.linalg.vecdot(grad, row) / norm.square()
            grad.addcmul_(row, along[:, None], value=-1)

    @torch.no_grad()
    def normalise(self) -> None:
        """Bring every feature's direction back to its norm."""
        now = torch.linalg.vector_norm(self.W_dec, dim=1).clamp_min(1e-30)
        self.W_dec.mul_((self.norms / now)[:, None])


@dataclass(frozen=True, eq=False)
class Exported:
    """Weights that read the raw residual, as the SAE classes take them.

    Attributes:
        tensors: `W_enc (d_sae, d_model)`, `W_dec (d_model, d_sae)`, `b_enc`, `b_dec`.
        extra: the architecture's own tensors, still in units of the scaled residual.
        scale: divide a scaled activation by this to get a raw one.
    """

    tensors: dict[str, Tensor]
    extra: dict[str, Tensor]
    scale: float
    hook_point: str
    identity: Identity
    meta: Mapping[str, Any]

    def as_jumprelu(self, threshold: Tensor) -> JumpReLU:
        """The SAE with `threshold (d_sae,)`, in units of the raw residual; its fingerprint covers the threshold."""
        own = replace(self.identity, fingerprint=fingerprint(**self.tensors, threshold=threshold))
        return JumpReLU(**self.tensors, threshold=threshold, hook_point=self.hook_point, identity=own, meta=self.meta)


@torch.no_grad()
def exported(weights: Weights, hook_point: str, group: str, meta: Mapping[str, Any], ranks: Ranks) -> Exported:
    """The same function of the raw residual: pre-bias and scale folded into the two biases.

    `W_enc (s x) + b = s (W_enc x + b / s)`, so dividing both biases by `s` gives the raw activations and the raw
    reconstruction, and leaves both matrices as they are.
    """

    def whole(tensor: Tensor) -> Tensor:
        joined = gathered(tensor.detach()) if ranks.mode == "features" and tensor.ndim else tensor.detach()
        return joined.cpu().clone()

    tensors = {
        "W_enc": whole(weights.W_enc),
        "W_dec": whole(weights.W_dec).T.contiguous(),
        "b_enc": whole(weights.bias() / weights.scale),
        "b_dec": (weights.b_dec / weights.scale).detach().cpu().clone(),
    }
    identity = Identity(group, HookPoint.parse(hook_point).layer, fingerprint(**tensors))
    extra = {name: whole(tensor) for name, tensor in weights.extra.items()}
    return Exported(tensors, extra, weights.scale, hook_point, identity, meta)

"""The weights of one SAE while it is trained: how they start, stay on the sphere, and leave."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen_scope.errors import InputError, MismatchError
from qwen_scope.model import HookPoint
from qwen_scope.sae import SAE, Identity, JumpReLU, fingerprint

from .parallel import Ranks, gathered
from .selection import best_of
from .sparse import weighted_rows

if TYPE_CHECKING:
    from .config import TrainConfig

# Random rows are drawn so many at a time, whichever slice of them is kept.
DRAWN_ROWS = 4096
UNIT_TOLERANCE = 1e-3


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


def scale_of(config: TrainConfig, x: Tensor) -> float:
    """What brings the mean squared norm of the rows of `x (n, d_model)` to d_model."""
    if not config.scale_input:
        return 1.0
    mean_square = float(x.double().square().sum(1).mean())
    if not mean_square > 0:
        raise InputError("the first batch of residuals is all zeros or holds NaN; nothing can be learnt from it")
    return (x.shape[1] / mean_square) ** 0.5


def fresh(config: TrainConfig, name: str, x: Tensor, ranks: Ranks) -> Weights:
    """New weights for the residual called `name`, from its whole first batch `(n, d_model)` without sinks.

    Random unit directions in the decoder, `b_dec` the geometric median of the batch, and the encoder the decoder's
    transpose times the one number that lets the k largest features of each token reconstruct the batch best: without
    it k overlapping directions overshoot, and the first steps are spent on shrinking them.
    """
    scale, held = scale_of(config, x), ranks.slice_of(config.d_sae)
    draws = generator(config.seed, name)
    W_dec = torch.empty(held.stop - held.start, x.shape[1])
    for start in range(0, config.d_sae, DRAWN_ROWS):
        rows = torch.randn(min(DRAWN_ROWS, config.d_sae - start), x.shape[1], generator=draws)
        low, high = max(start, held.start), min(start + len(rows), held.stop)
        if low < high:
            kept = rows[low - start : high - start]
            W_dec[low - held.start : high - held.start] = kept / torch.linalg.vector_norm(kept, dim=1, keepdim=True)
    W_dec = W_dec.to(x.device)
    weights = trainable(
        W_dec.clone(), W_dec, x.new_zeros(len(W_dec)), geometric_median(x * scale),
        scale=scale, pre_bias=config.pre_bias, norms=x.new_ones(len(W_dec)), first=held.start,
    )  # fmt: skip
    calibrate(config, weights, x * scale, ranks)
    return weights


@torch.no_grad()
def calibrate(config: TrainConfig, weights: Weights, x: Tensor, ranks: Ranks) -> None:
    """Multiply the encoder by the least-squares amount with which `k` features of each row reconstruct `x`."""
    slices = ranks if ranks.mode == "features" else Ranks()
    values, active = best_of(x, weights.W_enc, weights.bias(), config.k, slices)
    found = slices.over_features(weighted_rows(values, active, weights.W_dec))
    wanted = x - weights.b_dec
    amount = float((wanted * found).sum() / found.square().sum().clamp_min(1e-30))
    if amount > 0:
        weights.W_enc.mul_(amount)


def continued(config: TrainConfig, sae: SAE, x: Tensor, ranks: Ranks) -> Weights:
    """The weights of a finished SAE, ready to be trained on: the same function of the residual.

    Raises:
        MismatchError: the SAE has other sizes than the config or the residual.
    """
    if sae.d_sae != config.d_sae or sae.d_model != x.shape[1]:
        raise MismatchError(
            f"{sae.identity} has {sae.d_sae} features of {sae.d_model} dimensions; this run trains"
            f" {config.d_sae} features on residuals of {x.shape[1]} dimensions"
        )
    scale, held = scale_of(config, x), ranks.slice_of(config.d_sae)
    W_enc = sae.W_enc[held].to(x.device, torch.float32).clone()
    W_dec = sae.W_dec[:, held].T.to(x.device, torch.float32).contiguous().clone()
    b_dec = sae.b_dec.to(x.device, torch.float32) * scale
    b_enc = sae.b_enc[held].to(x.device, torch.float32) * scale
    if config.pre_bias:
        b_enc = b_enc + W_enc @ b_dec
    norms = torch.linalg.vector_norm(W_dec, dim=1)
    norms = torch.where((norms - 1).abs() < UNIT_TOLERANCE, 1.0, norms)
    return trainable(
        W_enc, W_dec, b_enc, b_dec, scale=scale, pre_bias=config.pre_bias, norms=norms, first=held.start
    )  # fmt: skip


def trainable(W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, **rest: Any) -> Weights:
    """Weights whose four tensors take gradients."""
    for tensor in (W_enc, W_dec, b_enc, b_dec):
        tensor.requires_grad_()
    return Weights(W_enc, W_dec, b_enc, b_dec, **rest)


def generator(seed: int, name: str) -> torch.Generator:
    """A generator that depends on the run's seed and the layer's name, not on which other layers are trained."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def geometric_median(x: Tensor, steps: int = 64, tolerance: float = 1e-6) -> Tensor:
    """The point with the smallest sum of distances to the rows of `x (n, d)`, by Weiszfeld's iteration."""
    point = x.mean(0)
    for _ in range(steps):
        weight = 1 / torch.linalg.vector_norm(x - point, dim=1).clamp_min(1e-12)
        moved = (weight @ x) / weight.sum()
        done = torch.linalg.vector_norm(moved - point) <= tolerance * torch.linalg.vector_norm(point)
        point = moved
        if done:
            break
    return point


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

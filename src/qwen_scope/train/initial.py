"""The weights that training starts with: new ones, or those of a finished SAE."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from qwen_scope.errors import InputError, MismatchError
from qwen_scope.sae import SAE, in_float64

from .config import TrainConfig
from .parallel import Ranks
from .selection import best_of
from .sparse import weighted_rows
from .weights import DRAWN_ROWS, Weights

UNIT_TOLERANCE = 1e-3


def scale_of(config: TrainConfig, x: Tensor) -> float:
    """What brings the mean squared norm of the rows of `x (n, d_model)` to d_model."""
    if not config.scale_input:
        return 1.0
    mean_square = float(in_float64(x).square().sum(1).mean())
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

"""What each feature adds while those of all layers grow together: the shares that `faithfulness` measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope.report import Progress
from qwen_scope.sae import SAE, FeatureActs

from .passes import along, gradients, keeping, pieces, rows_with_gradient
from .reading import Reading


def jointly(
    reading: Reading, steps: int, progress: Progress | None = None
) -> tuple[Mapping[int, Float[Tensor, " n"]], Mapping[int, Float[Tensor, " seq"]]]:
    """By layer, the effects of active features and of errors on a way from no feature to all, at every layer at once.

    At a point `t` of the way every feature of every layer taken apart is `t` times what it is in that run, and errors
    stay: the runs of `faithfulness`, with a share of each feature instead of a set of them. The mean over `t` of
    `t`-derivatives by single features is the Aumann-Shapley value of that game, so features of all layers together add
    up to the quantity with all of them less that with none, where they are active along the way. It is taken at `steps`
    midpoints, since TopK makes the derivative jump. An error's effect is its size along the mean gradient.
    """
    sums = {layer: _Sums(reading, layer, steps) for layer in reading.layers}
    points = (np.arange(steps) + 0.5) / steps
    blocks = reading.last_block + 1
    rows = min(rows_with_gradient(reading.length, blocks), steps)
    for start in range(0, steps, rows):
        if progress is not None:
            progress("effects", start / steps, f"{steps} points")
        some = torch.tensor(points[start : start + rows], dtype=torch.float32)
        changes = {layer: _grown(sums[layer], some) for layer in reading.layers}
        with torch.enable_grad(), keeping(reading.scope.model, len(some) * reading.length, blocks):
            begin = reading.copies(len(some)).clone().requires_grad_()
            gradients(reading.run(begin, changes), [begin])
    return {layer: one.features for layer, one in sums.items()}, {layer: one.errors for layer, one in sums.items()}


class _Sums:
    """What the backward passes of one layer add up to."""

    def __init__(self, reading: Reading, layer: int, steps: int) -> None:
        self.sae, self.steps, self.error = reading.scope.saes[layer], steps, reading.errors[layer]
        one = reading.active[layer]
        self.features, self.errors = torch.zeros_like(one.values), torch.zeros_like(self.error[:, 0])
        keys = one.positions * self.sae.d_sae + one.features
        self.order = keys.argsort()
        self.keys = keys[self.order]
        self.counts = torch.tensor([not reason for reason in reading.left_out[layer]], device=self.sae.device)[:, None]

    def add(
        self,
        indices: Int[Tensor, "rows seq k"],
        values: Float[Tensor, "rows seq k"],
        slopes: Float[Tensor, "rows seq k"],
        gradient: Float[Tensor, "rows seq d_model"],
    ) -> None:
        """Count activations times the gradient along their directions for the nodes among them, and errors."""
        self.errors += (gradient.sum(0) * self.error).sum(-1) / self.steps
        if not len(self.keys):
            return
        token = torch.arange(indices.shape[1], device=indices.device)[:, None]
        keys = (token * self.sae.d_sae + indices).flatten()
        at = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        gains = torch.where(self.keys[at] == keys, (values * slopes).flatten(), 0.0)
        self.features.index_add_(0, self.order[at], gains / self.steps)


def _grown(sums: _Sums, shares: Float[Tensor, " rows"]) -> Callable[[Tensor], Tensor]:
    """The change that leaves of each row's features a share."""
    return lambda h: _Shrunk.apply(h, sums, shares.to(h.device)[:, None, None])  # pyright: ignore[reportReturnType]


class _Shrunk(torch.autograd.Function):
    """A stream whose features are a share of what they are; its backward pass adds up what each of them gives.

    Nothing of the size of the dictionary is kept: the active features alone, with the derivative of those that count.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, sums: _Sums, shares: Tensor) -> Tensor:
        sae, live = sums.sae, h.float()
        acts = sae.encode(live)
        values = acts.values * sums.counts
        less = FeatureActs(acts.indices, values * (1 - shares), acts.width)
        ctx.sums, ctx.less = sums, 1 - shares
        ctx.save_for_backward(acts.indices, values)
        return (live - (sae.decode(less) - sae.b_dec.float())).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *found: Any) -> tuple[Tensor, None, None]:
        indices, values = ctx.saved_tensors
        indices, gradient = indices.long(), found[0].float()
        sae: SAE = ctx.sums.sae
        rows, seq, k = indices.shape
        tokens = torch.arange(rows * seq, device=indices.device).repeat_interleave(k)
        slopes = along(sae, indices.flatten(), tokens, gradient.reshape(1, rows * seq, -1))[0].reshape(rows, seq, k)
        ctx.sums.add(indices, values, slopes, gradient)
        weights = (ctx.less * slopes * (values > 0)).reshape(-1, k)
        back = torch.empty(rows * seq, sae.d_model, device=gradient.device)
        for start, stop in pieces(rows * seq, k * sae.d_model):
            encoders = sae.W_enc[indices.reshape(-1, k)[start:stop]].float()
            back[start:stop] = (weights[start:stop, None] @ encoders)[:, 0]
        return (gradient - back.reshape(gradient.shape)).to(found[0].dtype), None, None

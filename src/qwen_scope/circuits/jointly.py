"""What each feature adds while those of all layers grow together: the shares that `faithfulness` measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.report import Progress

from .reading import Reading, gradients


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
    features = {layer: torch.zeros_like(one.values) for layer, one in reading.active.items()}
    errors = {layer: torch.zeros_like(one[:, 0]) for layer, one in reading.errors.items()}
    points = (np.arange(steps) + 0.5) / steps
    rows = max(1, min(reading.rows // 2, steps))  # each keeps a layer's features beside the model's own activations
    for start in range(0, steps, rows):
        if progress is not None:
            progress("effects", start / steps, f"{steps} points")
        some = torch.tensor(points[start : start + rows], dtype=torch.float32)
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        changes = {layer: _grown(reading, layer, some, kept) for layer in reading.layers}
        with torch.enable_grad():
            value = reading.run(reading.copies(len(some)).clone().requires_grad_(), changes)
        slopes = gradients(value, [kept[layer][0] for layer in reading.layers])
        for layer, slope in zip(reading.layers, slopes, strict=True):
            one, sae = reading.active[layer], reading.scope.saes[layer]
            own = kept[layer][1]
            directions = sae.W_dec[:, one.features].T.float()
            for row in range(len(some)):
                features[layer] += own[row] * (directions * slope[row][one.positions]).sum(-1) / steps
            errors[layer] += (slope.sum(0) * reading.errors[layer]).sum(-1) / steps
    return features, errors


def _grown(
    reading: Reading, layer: int, shares: Float[Tensor, " rows"], kept: dict[int, tuple[Tensor, Tensor]]
) -> Callable[[Tensor], Tensor]:
    """The change that leaves of each row's features a share; it keeps the stream, and each node's activation there."""
    one, sae = reading.active[layer], reading.scope.saes[layer]
    counts = torch.tensor([not reason for reason in reading.left_out[layer]], device=sae.device)[:, None]

    def change(h: Tensor) -> Tensor:
        live = h.float()
        acts = sae.encode(live.detach())
        named = torch.unique(torch.cat([acts.indices.flatten().long(), one.features]))
        slot = torch.zeros(sae.d_sae, dtype=torch.long, device=named.device)
        slot[named] = torch.arange(len(named), device=named.device)
        active = torch.zeros(*h.shape[:2], len(named), device=h.device)
        active.scatter_add_(-1, slot[acts.indices.long()], (acts.values > 0).float())
        values = sae.pre_acts(live, named).relu() * active.clamp(max=1) * counts
        less = (1 - shares.to(h.device))[:, None, None]
        new = live - less * (values @ sae.W_dec[:, named].T.float())
        kept[layer] = new, values.detach()[:, one.positions, slot[one.features]]
        return new.to(h.dtype)

    return change

"""How far two SAEs agree, such as an SAE and its converted copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError, MismatchError

from .base import SAE

PAIRS = 2**22  # slots compared with slots at a time


@dataclass(frozen=True)
class Agreement:
    """What `compare_saes` finds.

    Attributes:
        jaccard: mean over residuals of |A and B| / |A or B|, A and B the sets of active features; 1 is the same sets.
        value_error: length of the difference of all activations, divided by the length of `a`'s; 0 is the same values.
        rows: on how many residuals.
        random: whether these were random, for want of real ones.
    """

    jaccard: float
    value_error: float
    rows: int
    random: bool


def compare_saes(a: SAE, b: SAE, x: Float[Tensor, "*rows d_model"] | None = None, rows: int = 512) -> Agreement:
    """Encode the residuals `x` with both; without `x`, `rows` standard normal residuals around `a.b_dec`.

    Raises:
        MismatchError: the two have other widths.   InputError: there is no residual.
    """
    if (a.d_sae, a.d_model) != (b.d_sae, b.d_model):
        raise MismatchError(f"{a.d_sae} x {a.d_model} and {b.d_sae} x {b.d_model} SAEs can't be compared")
    random = x is None
    if x is None:
        noise = torch.randn(rows, a.d_model, generator=torch.Generator().manual_seed(0))
        x = noise + a.b_dec.detach().float().cpu()
    x = x.reshape(-1, a.d_model)
    if len(x) == 0:
        raise InputError("there is no residual to compare on")
    left, right = a.encode(x).to("cpu"), b.encode(x).to("cpu")
    step = max(1, PAIRS // max(1, left.k * right.k))
    jaccards, squares, total = [], 0.0, 0.0
    for start in range(0, len(x), step):
        one, two = left[start : start + step], right[start : start + step]
        u, v = one.values.double(), two.values.double()
        same = (one.indices[:, :, None] == two.indices[:, None, :]) & (u > 0)[:, :, None] & (v > 0)[:, None, :]
        both = same.sum((1, 2))
        either = one.active() + two.active() - both
        jaccards.append(torch.where(either > 0, both / either.clamp(min=1), 1.0))
        paired = torch.where(same, u[:, :, None] - v[:, None, :], 0.0).square().sum()
        alone = (u * ~same.any(2)).square().sum() + (v * ~same.any(1)).square().sum()
        squares += float(paired + alone)
        total += float(u.square().sum())
    error = (squares / total) ** 0.5 if total else float(squares > 0)
    return Agreement(float(torch.cat(jaccards).mean()), error, len(x), random)

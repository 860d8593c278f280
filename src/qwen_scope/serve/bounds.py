"""How large a residual may become, so that nothing behind it overflows and no request ends a worker for everybody."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

MOST = 1e15
"""Of one number of a residual. The sum of its squares over any width is far from overflowing fp32, and so is its
product with an SAE's weights. Real models reach 1e5."""


def most_added(dtype: torch.dtype) -> float:
    """The largest number that may be added to a residual of this type at one layer: many of them leave it finite."""
    return min(MOST, torch.finfo(dtype).max / 16)


def readable(h: Tensor) -> Bool[Tensor, " rows"]:
    """Which rows of residuals `(rows, d_model)` an SAE can read: every number is finite and at most `MOST`."""
    return h.abs().amax(-1) <= MOST

"""Arithmetic in float64, which not every device has."""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

HAVE_FLOAT64 = ("cpu", "cuda")


def in_float64(x: Tensor) -> Float64[Tensor, ...]:
    """`x` in float64, where it is if its device has that type, else on the CPU; Apple's MPS does not have it."""
    return x.double() if x.device.type in HAVE_FLOAT64 else x.cpu().double()

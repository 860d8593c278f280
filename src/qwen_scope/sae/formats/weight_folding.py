"""Arithmetic other tools do at run time, moved into the weights: in float64, a few rows at a time, kept as fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import check_finite_weights

ROWS = 1024


def encoder_of_b_dec(W_enc: Tensor, b_dec: Tensor) -> Tensor:
    """`W_enc @ b_dec` in float64: what subtracting `b_dec` from the residual takes from each pre-activation."""
    found = torch.cat([rows.double() @ b_dec.double() for rows in W_enc.split(ROWS)])
    check_finite_weights("b_dec", b_dec)
    if not found.isfinite().all():
        check_finite_weights("W_enc", W_enc)
    return found


def without_b_dec(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """The `b_enc` that reads the raw residual, for an SAE that reads `x - b_dec`."""
    return (b_enc.double() - encoder_of_b_dec(W_enc, b_dec)).float()


def with_b_dec(W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """The `b_enc` that reads `x - b_dec`, for an SAE that reads the raw residual."""
    return (b_enc.double() + encoder_of_b_dec(W_enc, b_dec)).float()


def unscaled(W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`b_enc` and `b_dec` on the raw residual, for an SAE that reads `x * scale - b_pre` and writes its inverse.

    With `pre = (x * scale - b_pre) @ W_enc.T + b_enc`, the new pre-activations are `pre / scale`: the same order and
    the same signs for a positive scale, and the same reconstruction with the matrices as they are.
    """
    folded = (b_enc.double() - encoder_of_b_dec(W_enc, b_pre)) / scale
    return folded.float(), (b_pre.double() / scale).float()


def decoder_norms(W_dec: Tensor) -> Tensor:
    """The length of each feature's direction in float64; 1 for a feature that writes nothing."""
    norms = torch.cat([columns.double().norm(dim=0) for columns in W_dec.split(ROWS, dim=1)])
    return torch.where(norms == 0, 1.0, norms)


def scaled_rows(matrix: Tensor, factors: Tensor) -> Tensor:
    """`matrix * factors[:, None]` as fp32, each entry rounded once."""
    parts = zip(matrix.split(ROWS), factors.split(ROWS), strict=True)
    return torch.cat([(rows.double() * factor[:, None]).float() for rows, factor in parts])

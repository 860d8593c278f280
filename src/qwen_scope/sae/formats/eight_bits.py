"""Matrices in 8 bits: whole numbers and a scale per feature, opened as the bfloat16 numbers that they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from qwen_scope.errors import FormatError

from ..base import SAE, fingerprint
from .container import read_weights

# Over which dimension the numbers of one feature lie.
OVER = {"W_enc": 1, "W_dec": 0}
LARGEST = 127
# A feature whose largest number is below this is kept as zeros: its scale would be subnormal.
SMALLEST = 2.0**-100
# Matrices are read and written in pieces of about this many numbers.
NUMBERS = 2**20
ROUNDED = "rounded"
"""The part of `SAE.meta` that says from which SAE, by fingerprint, one was rounded; by hook point."""


@torch.no_grad()
def in_eight_bits(sae: SAE) -> SAE:
    """The SAE whose matrices are those of `sae` rounded to 8 bits, in bfloat16: another one, with its own fingerprint.

    One that was rounded so already comes back as it is, to the bit.

    Raises:
        InputError: its weights are not finite.
    """
    for name in OVER:
        sae.check_finite(name)
    made = {name: unpack(name, *pack(name, getattr(sae, name))) for name in OVER}
    vectors = {"b_enc": sae.b_enc, "b_dec": sae.b_dec, **sae.own_tensors()}
    vectors = {name: tensor.detach().cpu() for name, tensor in vectors.items()}
    own = fingerprint(**made, **vectors)
    if own == sae.identity.fingerprint:
        return sae.to("cpu", torch.bfloat16)
    meta = {**sae.meta, ROUNDED: {sae.hook_point or "": sae.identity.fingerprint}}
    identity = replace(sae.identity, fingerprint=own)
    return replace(cast(Any, sae), **made, **vectors, identity=identity, meta=meta)


def packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an SAE from `in_eight_bits` as files keep them: both matrices in int8 with `W_enc_scale` and
    `W_dec_scale` beside them, `(d_sae,)` fp32. No number changes."""
    kept = dict(tensors)
    for name in OVER:
        kept[name], kept[f"{name}_scale"] = pack(name, tensors[name])
    return kept


def open_packed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `read_weights`; matrices in 8 bits become bfloat16, and are no longer those of the mapped file.

    Raises:
        NotFoundError, FormatError: as `read_weights`, or there is not one scale per feature.
    """
    tensors, metadata = read_weights(path)
    if not any(name in tensors and tensors[name].dtype == torch.int8 for name in OVER):
        return tensors, metadata
    for name in OVER:
        scale = tensors.pop(f"{name}_scale", None)
        whole = tensors.get(name)
        if whole is None or whole.dtype != torch.int8 or whole.ndim != 2 or scale is None:
            raise FormatError(f"{path} keeps weights in 8 bits, but lacks {name} as an int8 matrix or its {name}_scale")
        width = whole.shape[1 - OVER[name]]
        if scale.dtype != torch.float32 or scale.shape != (width,) or not bool((scale.isfinite() & (scale >= 0)).all()):
            raise FormatError(
                f"{name}_scale in {path} must be one finite float32 number of at least 0 for each of {width} features"
            )
        tensors[name] = unpack(name, whole, scale)
    return tensors, metadata


def pack(name: str, matrix: Tensor) -> tuple[Int8[Tensor, "rows columns"], Float[Tensor, " d_sae"]]:
    """A matrix in whole numbers from -127 to 127, and what one of them is worth in each feature.

    A feature's largest number is rounded to bfloat16 and is 127 of its scales, so what was packed once is packed into
    the same numbers again: bfloat16 moves none of them by more than a quarter of the scale.
    """
    matrix = matrix.detach().cpu()
    found = [piece.float().abs().amax(OVER[name]) for _, piece in pieces(matrix)]
    largest = (torch.cat(found) if OVER[name] == 1 else torch.stack(found).amax(0)).bfloat16().float()
    scale = torch.where(largest < SMALLEST, 0.0, largest / LARGEST)
    whole = torch.empty(matrix.shape, dtype=torch.int8)
    by = torch.where(scale > 0, scale, torch.inf)
    for rows, piece in pieces(matrix):
        whole[rows] = (piece.float() / broad(name, by, rows)).round_().to(torch.int8)
    return whole, scale


def unpack(
    name: str, whole: Int8[Tensor, "rows columns"], scale: Float[Tensor, " d_sae"]
) -> Float[Tensor, "rows columns"]:
    """The numbers that a packed matrix stands for: whole number times scale in fp32, rounded to bfloat16."""
    matrix = torch.empty(whole.shape, dtype=torch.bfloat16)
    for rows, piece in pieces(whole):
        matrix[rows] = piece.float().mul_(broad(name, scale, rows))
    return matrix


def broad(name: str, scale: Tensor, rows: slice) -> Tensor:
    """The scales of some rows of a matrix, in a shape that multiplies them."""
    return scale[rows, None] if OVER[name] == 1 else scale


def pieces(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time."""
    step = max(1, NUMBERS // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        yield slice(start, start + step), matrix[start : start + step]

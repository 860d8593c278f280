"""Quantised weights back to numbers: one pure function for each way of storing them.

Each takes the tensors that store one weight and gives its values in float32, `(out_features, in_features)` for a linear
layer. Activations that a format would quantise while it runs are left as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwen_scope.errors import FormatError

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the columns of eight lie in a word


def scaled(values: Tensor, scale: Tensor, zero: Tensor | None = None, block: tuple[int, int] | None = None) -> Tensor:
    """`(values - zero) * scale`, for values of 8 bits in one tensor, rows, groups of a row, or blocks.

    Args:
        values: `(..., rows, columns)`.
        scale: one number; `(..., rows, groups)`; or one for each block, the last ones of a row or column being cut.
            In whole numbers it holds exponents of 2 with an offset of 127 (OCP Microscaling, E8M0).
        zero: like `scale`.
        block: rows and columns of a block.

    Raises:
        FormatError: the scales do not fit the values.
    """
    factor = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    offset = None if zero is None else zero.float()
    numbers = values.float()
    if scale.numel() > 1:
        factor, offset = (None if one is None else spread(one, values.shape, block) for one in (factor, offset))
    assert factor is not None
    return (numbers if offset is None else numbers - offset) * factor


def spread(scale: Tensor, shape: torch.Size, block: tuple[int, int] | None) -> Tensor:
    """Scales by row, group or block to one for each value."""
    if scale.dim() == 1:
        scale = scale[:, None]
    rows, columns = shape[-2:]
    grid = tuple(scale.shape[-2:])
    size = block if block is not None and grid != (rows, 1) else (1, math.ceil(columns / grid[1]))
    if scale.shape[:-2] != shape[:-2] or grid != (math.ceil(rows / size[0]), math.ceil(columns / size[1])):
        how = "by row or group" if block is None else f"in blocks of {block[0]} x {block[1]}"
        raise FormatError(f"the scales {tuple(scale.shape)} do not fit a weight {tuple(shape)} {how}")
    scale = scale.repeat_interleave(size[0], -2)[..., :rows, :]
    return scale.repeat_interleave(size[1], -1)[..., :columns]


def gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None, plus_one: bool = True) -> Tensor:
    """GPTQ: `(q - (z + 1)) * scale` of the group of each input (the `+ 1` not in the format called `gptq_v2`).

    Args:
        qweight: `(inputs * bits / 32, outputs)` int32, packed along the inputs.
        qzeros: `(groups, outputs * bits / 32)` int32, packed along the outputs.
        scales: `(groups, outputs)`.
        g_idx: the group of each input; by default groups of equal size in order.
    """
    groups, outputs = scales.shape
    bits = 32 * qzeros.shape[1] // outputs
    _need_bits(bits)
    inputs = qweight.shape[0] * 32 // bits
    zeros = unpack(qzeros, bits)
    zeros = ((zeros + 1) & (2**bits - 1) if plus_one else zeros).float()
    group = g_idx.long() if g_idx is not None else torch.arange(inputs, device=qweight.device) // -(-inputs // groups)
    return (unpack(qweight.T, bits).float() - zeros.T[:, group]) * scales.T.float()[:, group]


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """AWQ as AutoAWQ's `gemm`: `(q - z) * scale`, four bits, eight outputs in a word in the order of `AWQ_ORDER`.

    Args:
        qweight: `(inputs, outputs / 8)` int32.   qzeros: `(groups, outputs / 8)` int32.   scales: `(groups, outputs)`.
    """

    def unpacked(words: Tensor) -> Tensor:
        inside = unpack(words, 4).reshape(*words.shape, 8)
        return inside[..., list(AWQ_ORDER)].reshape(len(words), -1).float()

    size = qweight.shape[0] // scales.shape[0]
    zeros, factor = (one.repeat_interleave(size, 0) for one in (unpacked(qzeros), scales.float()))
    return ((unpacked(qweight) - zeros) * factor).T


def packed(
    words: Tensor,
    scale: Tensor,
    shape: tuple[int, int],
    bits: int,
    zero: Tensor | None = None,
    g_idx: Tensor | None = None,
) -> Tensor:
    """compressed-tensors' `pack-quantized`: values and zeros are stored with an offset of half their range.

    Args:
        words: `(outputs, ceil(inputs * bits / 32))` int32.   scale: `(outputs, groups)`, or one number.
        shape: outputs and inputs.
        zero: `(ceil(outputs * bits / 32), groups)`, packed along the outputs.
        g_idx: the group of each input, where inputs were put in another order.
    """
    half = 2 ** (bits - 1)
    values = unpack(words, bits)[:, : shape[1]] - half
    if zero is not None:
        zero = unpack(zero.T, bits)[:, : shape[0]].T - half
    if g_idx is None or (g_idx < 0).any():
        return scaled(values, scale, zero)
    at = g_idx.long()
    return scaled(values, scale[:, at], None if zero is None else zero[:, at])


def affine(words: Tensor, scales: Tensor, biases: Tensor, size: int) -> Tensor:
    """MLX's affine: `q * scale + bias` in groups of `size` inputs.

    Args:
        words: `(..., outputs, inputs * bits / 32)` uint32.   scales, biases: `(..., outputs, inputs / size)`.
    """
    inputs = scales.shape[-1] * size
    bits, rest = divmod(words.shape[-1] * 32, inputs)
    if rest or not 1 <= bits <= 8:
        raise FormatError(
            f"packed words {tuple(words.shape)} do not fit scales {tuple(scales.shape)} of groups of {size}"
        )
    values = unpack(words.view(torch.int32), bits).reshape(*scales.shape, size).float()
    return (values * scales.float()[..., None] + biases.float()[..., None]).flatten(-2)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Whole numbers of a few bits that follow each other from the lowest bit of int32 words on, `(..., words)` to
    `(..., values)` int32.
    """
    if 32 % bits == 0:
        shift = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
        return ((words[..., None] >> shift) & (2**bits - 1)).flatten(-2)
    count = words.shape[-1] * 32 // bits
    begin = torch.arange(count, device=words.device) * bits
    word, offset = begin // 32, begin % 32
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    pair = wide[..., word] | wide[..., word + 1] << 32
    return ((pair >> offset) & (2**bits - 1)).int()


def _need_bits(bits: int) -> None:
    if bits not in (2, 4, 8):
        raise FormatError(f"GPTQ weights of {bits} bits are not read; 2, 4 and 8 are")

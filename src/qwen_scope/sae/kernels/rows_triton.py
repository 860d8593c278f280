"""The rows of encode and decode for CUDA; the only module that imports Triton.

No product of matrices here: that is cuBLAS's, in bf16. Every sum is taken in fp32, elementwise, so TF32 plays no part.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap
from typing import Any

import triton
import triton.language as tl


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, which can't compile a checker of signatures."""
    return triton.jit(unwrap(function))


@jit
def _bound(terms, per, there):
    """`docs/encode.md`'s sum of four products, for features or groups that start at `per`."""
    total = tl.load(terms) * tl.load(per, mask=there, other=0.0)
    total += tl.load(terms + 1) * tl.load(per + 1, mask=there, other=0.0)
    total += tl.load(terms + 2) * tl.load(per + 2, mask=there, other=0.0)
    return total + tl.load(terms + 3) * tl.load(per + 3, mask=there, other=0.0)


@jit
def lower_bounds(
    low, terms, per_group, out, groups, stride, round_out,
    members: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """`out[row, g]`: what the largest member of group g must reach at least. Programs: (rows, blocks of groups)."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * block + tl.arange(0, block)
    there = g < groups
    member = tl.arange(0, members)
    at = row * stride + member[:, None] * groups + g[None, :]
    best = tl.max(tl.load(low + at, mask=there[None, :], other=0.0).to(tl.float32), axis=0)
    best = tl.maximum(best, 0.0)
    slack = _bound(terms + row * 4, per_group + g * 4, there)
    tl.store(out + row * groups + g, best * (1 - round_out) - slack, mask=there)


@jit
def candidates(
    low, terms, per_feature, per_group, floor, features, approx, reach, counts, d_sae, groups, stride, budget,
    round_out, block: tl.constexpr,
):  # fmt: skip
    """The features of a row that could reach its floor, ascending, and how many there are. Programs: (rows,).

    Each comes with its number in the product and the most that it could be. Beyond the budget they are counted and not
    written. The bounds of groups stay in the cache of a processor and rule out nearly all; only what is left reads its
    own, of which each row would else read eight times as much as of the product.
    """
    row = tl.program_id(0).to(tl.int64)
    least = tl.load(floor + row)
    found = 0
    for start in range(0, d_sae, block):
        feature = start + tl.arange(0, block)
        there = feature < d_sae
        value = tl.load(low + row * stride + feature, mask=there, other=0.0).to(tl.float32)
        near = value + tl.abs(value) * round_out
        maybe = there & (near + _bound(terms + row * 4, per_group + feature % groups * 4, there) >= least)
        most = near + _bound(terms + row * 4, per_feature + feature * 4, maybe)
        passes = maybe & (most >= least)
        slot = found + tl.cumsum(passes.to(tl.int32), 0) - 1
        to = row * budget + slot
        fits = passes & (slot < budget)
        tl.store(features + to, feature, mask=fits)
        tl.store(approx + to, value, mask=fits)
        tl.store(reach + to, most, mask=fits)
        found += tl.sum(passes.to(tl.int32), 0)
    tl.store(counts + row, found)


@jit
def dots(
    left, right, bias, index, wanted, out, width, slots,
    rectify: tl.constexpr, block_slots: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """`out[row, slot] = left[row] . right[index[row, slot]]` where it is wanted; the other slots are left as they are.

    With `rectify`, `relu` of that and of `bias[index[row, slot]]`. Programs: (rows, blocks of slots).
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * block_slots + tl.arange(0, block_slots)
    there = tl.load(wanted + row * slots + slot, mask=slot < slots, other=0) != 0
    if tl.sum(there.to(tl.int32), 0) > 0:
        which = tl.load(index + row * slots + slot, mask=there, other=0).to(tl.int64)
        total = tl.zeros([block_slots], tl.float32)
        for start in range(0, width, block_width):
            d = start + tl.arange(0, block_width)
            inside = d < width
            a = tl.load(left + row * width + d, mask=inside, other=0.0).to(tl.float32)
            both = there[:, None] & inside[None, :]
            b = tl.load(right + which[:, None] * width + d[None, :], mask=both, other=0.0).to(tl.float32)
            total += tl.sum(a[None, :] * b, axis=1)
        if rectify:
            total = tl.maximum(total + tl.load(bias + which, mask=there, other=0.0).to(tl.float32), 0.0)
        tl.store(out + row * slots + slot, total, mask=there)


@jit
def bags(values, index, table, out, width, slots, block: tl.constexpr):
    """`out[row] = sum over slots of values[row, slot] * table[index[row, slot]]`. Programs: (rows, blocks of width)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * block + tl.arange(0, block)
    inside = d < width
    total = tl.zeros([block], tl.float32)
    for slot in range(slots):
        which = tl.load(index + row * slots + slot).to(tl.int64)
        value = tl.load(values + row * slots + slot).to(tl.float32)
        total += value * tl.load(table + which * width + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + d, total, mask=inside)


def blocks(n: int, block: int) -> int:
    """How many blocks hold n."""
    return -(-n // block)

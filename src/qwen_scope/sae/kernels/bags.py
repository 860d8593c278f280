"""Decode as weighted bags of decoder columns, so that neither dense rows nor an (n, k, d_model) tensor exists.

The decoder lies in memory dimension by dimension, but a bag wants a feature's numbers side by side. A few dimensions
at a time are turned over into a table that fits the cache, and all bags are summed from it before the next few.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from ..acts import FeatureActs
from . import triton

# A table that stays in the cache of one core complex while every bag reads from it.
TABLE_BYTES = 8 * 2**20
# A GPU's cache is no larger, but its memory is fast enough and each table costs a launch.
TABLE_BYTES_ON_GPU = 2**28
# Numbers in a line of cache: a narrower table wastes the rest of each line it reads.
LINE = 16
# Below one active slot per this many features, gathering their columns costs less than turning all of them over.
GATHER_SHARE = 8


def decode(
    acts: FeatureActs,
    W_dec: Float[Tensor, "d_model d_sae"],
    b_dec: Float[Tensor, " d_model"],
    tile_bytes: int | None = None,
    use_triton: bool | None = None,
) -> Float[Tensor, "*rows d_model"]:
    """`decode_reference` from the active columns only, differentiable in the values.

    Args:
        tile_bytes: the size of one table of turned-over columns, or of gathered ones.
        use_triton: whether Triton sums the bags; by default on CUDA, where it is installed.
    """
    on_cuda = W_dec.device.type == "cuda"
    tile_bytes = tile_bytes or (TABLE_BYTES_ON_GPU if on_cuda else TABLE_BYTES)
    use_triton = on_cuda and triton.available() if use_triton is None else use_triton
    acts = acts.to(W_dec.device)
    flat = acts.reshape(-1)
    values, indices = flat.values.float(), flat.indices
    learning = torch.is_grad_enabled() and W_dec.requires_grad
    if learning or indices.numel() * GATHER_SHARE <= acts.width:
        found = gathered(values, indices, W_dec, tile_bytes)
    else:
        found = Bags.apply(values, indices.contiguous(), W_dec, tile_bytes, use_triton)
    return (found + b_dec.float()).reshape(*acts.shape, len(W_dec))


def gathered(values: Tensor, indices: Tensor, W_dec: Tensor, tile_bytes: int) -> Tensor:
    """`(n, k) -> (n, d_model)` by gathering the columns of a few rows at a time; differentiable in everything."""
    d_model = len(W_dec)
    rows = max(1, tile_bytes // (4 * d_model * max(1, indices.shape[1])))
    out = []
    for some, weights in zip(indices.split(rows), values.split(rows), strict=True):
        columns = W_dec.index_select(1, some.flatten()).float().view(d_model, *some.shape)
        out.append(torch.einsum("dnk,nk->nd", columns, weights))
    return torch.cat(out)


class Bags(torch.autograd.Function):
    """`(n, k) -> (n, d_model)` by tables; backward turns the decoder over once more instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor, tile_bytes: int, use_triton: bool) -> Tensor:
        ctx.save_for_backward(indices, W_dec)
        ctx.tile_bytes, ctx.use_triton = tile_bytes, use_triton
        values = values.contiguous()
        out = values.new_empty(len(values), len(W_dec))
        starts = row_starts(indices)
        for dims, table in tables(W_dec, tile_bytes):
            if ctx.use_triton:
                out[:, dims] = triton.bags(values, indices, table)
            else:
                out[:, dims] = embedding_bag(
                    indices.flatten(), table, starts, mode="sum", per_sample_weights=values.flatten()
                )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        indices, W_dec = ctx.saved_tensors
        n, k = indices.shape
        total = grads[0].new_zeros(n * k)
        row_of = torch.arange(n, dtype=indices.dtype, device=indices.device).repeat_interleave(k)
        starts = row_starts(indices)
        for dims, table in tables(W_dec, ctx.tile_bytes):
            part = grads[0][:, dims].contiguous()
            if ctx.use_triton:
                total += triton.bags_gradient(part, indices, table).flatten()
                continue
            # What autograd calls for embedding_bag: the product of a bag's gradient with each of its rows.
            total += torch.ops.aten._embedding_bag_per_sample_weights_backward(
                part, table, indices.flatten(), starts, row_of, 0
            )
        return total.view(n, k), None, None, None, None


def row_starts(indices: Tensor) -> Tensor:
    """Where each row of `(n, k)` starts when flattened, in the type of the indices."""
    n, k = indices.shape
    return torch.arange(n, dtype=indices.dtype, device=indices.device) * k


def tables(W_dec: Tensor, tile_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """A few dimensions of all columns at a time as fp32 tables `(d_sae, dimensions)`.

    A decoder that lies feature by feature in fp32 is one table.
    """
    d_model, d_sae = W_dec.shape
    if W_dec.dtype == torch.float32 and W_dec.T.is_contiguous():
        yield slice(0, d_model), W_dec.detach().T
        return
    step = max(LINE, tile_bytes // (4 * d_sae) // LINE * LINE)
    # One piece of memory for all tables: fresh pages cost as much as filling them.
    room = torch.empty(d_sae * min(step, d_model), device=W_dec.device)
    for start in range(0, d_model, step):
        dims = slice(start, min(start + step, d_model))
        table = room[: d_sae * (dims.stop - start)].view(d_sae, -1)
        yield dims, table.copy_(W_dec.detach()[dims].T)

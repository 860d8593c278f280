"""Encode tile by tile: rows by a byte budget, and features too where weights must be widened to fp32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..acts import FeatureActs
from .product import linear_fp32, linear_widened
from .unchanged import Twins

# The largest working tensor of one tile: pre-activations, or weights widened to fp32.
TILE_BYTES = 64 * 2**20


def encode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, tile_bytes: int = TILE_BYTES, twins: Twins | None = None
) -> FeatureActs:
    """`encode_topk_reference`, holding at most about two tiles of `tile_bytes`; `twins` get equal values."""
    rows = x.reshape(-1, x.shape[-1]).to(W_enc.device)
    width, widest = len(W_enc), feature_step(W_enc, tile_bytes)
    best: FeatureActs | None = None
    with torch.no_grad():
        for features in feature_tiles(W_enc, tile_bytes):
            W, b = W_enc[features], b_enc[features].float()
            found = []
            for tile in rows.split(rows_per_tile(widest, tile_bytes)):
                pre = linear_widened(tile.float(), W, b)
                if twins is not None:
                    level(pre, tile.float(), W_enc, b_enc, features, twins, widest)
                found.append(largest(pre.relu_(), min(k, len(W))))
            values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
            best = merge(best, FeatureActs((indices + features.start).int(), values, width), k)
    assert best is not None, "a dictionary has at least one feature"
    clean = FeatureActs(torch.where(best.values == 0, 0, best.indices), best.values, width)
    return clean.reshape(*x.shape[:-1])


def level(pre: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, features: slice, twins: Twins, at_once: int) -> None:
    """Give the copies of a feature among `features` its pre-activation, in place.

    A product of another shape may round in another way, so every tile of features takes the values from the same ones:
    of these rows with all features that have copies, `at_once` at a time.
    """
    here = (twins.features >= features.start) & (twins.features < features.stop)
    originals, which = twins.first.unique(return_inverse=True)
    for start in range(0, len(originals), at_once):
        now = here & (which >= start) & (which < start + at_once)
        if now.any():
            part = originals[start : start + at_once]
            values = linear_fp32(x, W_enc[part].float(), b_enc[part].float())
            pre[:, twins.features[now] - features.start] = values[:, which[now] - start]


def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    tile_bytes: int = TILE_BYTES,
    twins: Twins | None = None,
) -> FeatureActs:
    """`encode_threshold_reference`, holding at most about two tiles of `tile_bytes`; `twins` get equal values."""
    rows = x.reshape(-1, x.shape[-1]).to(W_enc.device)
    width, widest = len(W_enc), feature_step(W_enc, tile_bytes)
    best: FeatureActs | None = None
    with torch.no_grad():
        for features in feature_tiles(W_enc, tile_bytes):
            W, b, t = W_enc[features], b_enc[features].float(), threshold[features].float()
            parts = []
            for tile in rows.split(rows_per_tile(widest, tile_bytes)):
                pre = linear_widened(tile.float(), W, b)
                if twins is not None:
                    level(pre, tile.float(), W_enc, b_enc, features, twins, widest)
                # `~(<=)` lets NaN through, where the check on the result finds it.
                kept = torch.where(~(pre <= t), pre.relu(), 0)
                values, indices = largest(kept, most_active(kept))
                parts.append(FeatureActs((indices + features.start).int(), values, width))
            found = FeatureActs.cat(parts)
            best = merge(best, found, found.k + (best.k if best else 0))
    assert best is not None, "a dictionary has at least one feature"
    k = most_active(best.values)
    values = best.values[:, :k]
    return FeatureActs(torch.where(values == 0, 0, best.indices[:, :k]), values, width).reshape(*x.shape[:-1])


def most_active(values: Tensor) -> int:
    """The number of nonzero entries of the fullest row."""
    return int((values != 0).sum(-1).max()) if values.numel() else 0


def feature_tiles(W_enc: Tensor, tile_bytes: int) -> Iterator[slice]:
    """Slices of features, `feature_step` at a time."""
    step, d_sae = feature_step(W_enc, tile_bytes), len(W_enc)
    for start in range(0, d_sae, step):
        yield slice(start, min(start + step, d_sae))


def feature_step(W_enc: Tensor, tile_bytes: int) -> int:
    """How many features a tile has: all in fp32, else as many as fit the budget once widened."""
    d_sae, d_model = W_enc.shape
    return d_sae if W_enc.dtype == torch.float32 else min(d_sae, max(1, tile_bytes // (4 * d_model)))


def rows_per_tile(width: int, tile_bytes: int) -> int:
    """How many rows of `width` fp32 numbers fit the budget."""
    return max(1, tile_bytes // (4 * width))


def largest(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, `(n, width) -> (n, k)` values and indices; equal values by lower index."""
    top = pre.topk(min(k + 1, pre.shape[-1]), dim=-1)
    values, indices = in_order(top.values[:, :k], top.indices[:, :k])
    if top.values.shape[-1] > k > 0:
        # topk promises nothing about which of several equal values it keeps; only rows cut inside a tie can be wrong.
        tied = ((top.values[:, k] == top.values[:, k - 1]) & (top.values[:, k] > 0)).nonzero().flatten()
        if len(tied):
            exact = pre[tied].sort(dim=-1, descending=True, stable=True)
            values[tied], indices[tied] = exact.values[:, :k], exact.indices[:, :k]
    return values, indices


def in_order(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Slots sorted by descending value, equal values by lower index."""
    indices, by_index = indices.sort(dim=-1)
    values, by_value = values.gather(-1, by_index).sort(dim=-1, descending=True, stable=True)
    return values, indices.gather(-1, by_value)


def merge(best: FeatureActs | None, found: FeatureActs, k: int) -> FeatureActs:
    """The k largest of two sets of features of the same rows."""
    if best is None:
        return found
    values, indices = in_order(
        torch.cat([best.values, found.values], -1), torch.cat([best.indices, found.indices], -1).long()
    )
    return FeatureActs(indices[:, :k].int(), values[:, :k], found.width)

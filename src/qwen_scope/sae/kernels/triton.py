"""The choice of `screened.choose_candidates` and the bags of `bags.decode` on CUDA, by way of Triton."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .bound import MEMBERS, ROUND_OUT, Screen
from .candidates import PER_ROW, PER_SLOT, Candidates, Tiles

GROUPS_AT_ONCE, FEATURES_AT_ONCE, SLOTS_AT_ONCE, DIMENSIONS_AT_ONCE = 64, 2048, 16, 128


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


@lru_cache(maxsize=8)
def multiplies_bf16(device: torch.device) -> bool:
    """Whether this GPU has tensor cores for bf16 and its product adds up in fp32, which the bound rests on."""
    if device.type != "cuda" or not available() or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    left = torch.zeros(32, 1040, dtype=torch.bfloat16, device=device)
    left[:, :1025] = 0.5
    left[:, 0] = 256
    # Where sums are kept in bf16, 256 plus many halves stays 256.
    return bool((product(left, torch.ones_like(left).T) == 768).all())


def product(x: Tensor, W: Tensor, out: Tensor | None = None) -> Tensor:
    """`x @ W` in bf16, with every partial sum kept in fp32: parts of one sum may otherwise be added in bf16."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction
    flags.allow_bf16_reduced_precision_reduction = False
    try:
        return torch.mm(x, W, out=out)
    finally:
        flags.allow_bf16_reduced_precision_reduction = before


def choose(tiles: Tiles, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, screen: Screen) -> Candidates:
    """What `screened.choose_candidates` does, a program per row."""
    from . import rows_triton

    ((low, rows),) = tiles
    n, groups, d_sae = len(low), screen.groups, screen.d_sae
    budget = min(PER_SLOT * k + PER_ROW, d_sae)
    if not n:
        none = low.new_zeros(0, k, dtype=torch.float32)
        return Candidates(none, none.int(), rows.covered, 0)
    lower = torch.empty(n, groups, device=low.device)
    grid = n, rows_triton.blocks(groups, GROUPS_AT_ONCE)
    rows_triton.lower_bounds[grid](
        low, rows.terms, screen.per_group, lower, groups, low.stride(0), ROUND_OUT, MEMBERS, GROUPS_AT_ONCE
    )
    floor = lower.topk(k, dim=1).values[:, -1].clamp_(min=0).contiguous()
    features = torch.empty(n, budget, dtype=torch.int32, device=low.device)
    approx, reach = torch.empty(2, n, budget, device=low.device)
    counts = torch.empty(n, dtype=torch.int32, device=low.device)
    rows_triton.candidates[(n,)](
        low, rows.terms, screen.per_feature, screen.per_group, floor, features, approx, reach, counts, d_sae, groups,
        low.stride(0), budget, ROUND_OUT, FEATURES_AT_ONCE,
    )  # fmt: skip
    certified = rows.covered & (counts <= budget)
    counts = torch.where(certified, counts, 0)
    width = max(k, int(counts.max()))
    features, approx, reach = (part[:, :width].contiguous() for part in (features, approx, reach))
    there = torch.arange(width, device=low.device) < counts[:, None]
    approx = torch.where(there, approx, -torch.inf)
    # The most probable first: their k-th largest value is the floor for the rest.
    wanted = there & (approx >= approx.topk(k, dim=1).values[:, -1:])
    exact = sampled_rows(x, W_enc, features, wanted, bias=b_enc)
    rest = there & ~wanted & (reach >= exact.topk(k, dim=1).values[:, -1:])
    sampled_rows(x, W_enc, features, rest, exact, b_enc)
    # Candidates stand in order of their features, so equal values keep the lower one first.
    values, order = exact.sort(dim=1, descending=True, stable=True)
    values, features = values[:, :k], features.gather(1, order[:, :k])
    return Candidates(values, torch.where(values > 0, features, 0), certified, int((wanted | rest).sum()))


def sampled_rows(
    left: Tensor, right: Tensor, index: Tensor, wanted: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`left[row] . right[index[row, slot]]` where it is wanted; other slots stay as they are, by default 0.

    With a bias, `relu` of that and of `bias[index[row, slot]]`.
    """
    from . import rows_triton

    n, slots = index.shape
    out = torch.zeros(n, slots, device=left.device) if out is None else out
    grid = n, rows_triton.blocks(slots, SLOTS_AT_ONCE)
    rows_triton.dots[grid](
        left, right, left if bias is None else bias, index, wanted, out, left.shape[1], slots, bias is not None,
        SLOTS_AT_ONCE, DIMENSIONS_AT_ONCE,
    )  # fmt: skip
    return out


def bags(values: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """`(n, k), (n, k), (d_sae, width) -> (n, width)`: weighted sums of rows of the table."""
    from . import rows_triton

    n, slots = index.shape
    out = torch.empty(n, table.shape[1], device=table.device)
    grid = n, rows_triton.blocks(table.shape[1], DIMENSIONS_AT_ONCE)
    rows_triton.bags[grid](values, index, table, out, table.shape[1], slots, DIMENSIONS_AT_ONCE)
    return out


def bags_gradient(grad: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """The gradient of `bags` in its values: each row's gradient times each of its rows of the table."""
    return sampled_rows(grad, table, index, torch.ones_like(index, dtype=torch.bool))

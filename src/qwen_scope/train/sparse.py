"""The active features of a batch in training, and the only four products that touch them.

A batch has n rows and d_sae features, but only `entries` of them are active. Nothing here is as large as
`n * d_sae` or `entries * d_model`: decode and both weight gradients are bags of rows, and the gradient of the
activations is a sampled product.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

SAMPLES = ("cpu", "cuda")
"""Devices on which PyTorch has a sampled product."""

PART_NUMBERS = 2**22
"""Numbers of a matrix's rows that are gathered at a time where it has none."""


@dataclass(frozen=True, eq=False)
class Active:
    """Which features are active in which row, as compressed rows.

    Attributes:
        offsets: where each row starts in `features`, and after the last its end: `(n + 1,)` int32.
        features: `(entries,)` int32, in no order within a row.
        width: the number of features, `d_sae`.
    """

    offsets: Tensor
    features: Tensor
    width: int

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def row_of(self) -> Tensor:
        """The row of each entry, `(entries,)` int32."""
        counts = self.offsets.diff().long()
        rows = torch.arange(self.rows, dtype=torch.int32, device=self.features.device)
        return rows.repeat_interleave(counts, output_size=len(self.features))

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor]:
        """The entries in the order of their features, and where each feature starts in that order."""
        ordered, order = self.features.sort(stable=True)
        every = torch.arange(self.width, dtype=torch.int32, device=ordered.device)
        return order, torch.searchsorted(ordered, every, out_int32=True)

    @classmethod
    def of_slots(cls, features: Tensor, width: int) -> Active:
        """Rows that all have the same number of entries, `(n, k)`."""
        n, k = features.shape
        offsets = torch.arange(0, n * k + 1, max(k, 1), dtype=torch.int32, device=features.device)
        return cls(offsets if k else offsets.new_zeros(n + 1), features.flatten().to(torch.int32), width)

    @classmethod
    def of_entries(cls, rows: Tensor, features: Tensor, n: int, width: int) -> Active:
        """Entries already in ascending order of their row."""
        every = torch.arange(n + 1, dtype=torch.int32, device=rows.device)
        offsets = torch.searchsorted(rows.int(), every, out_int32=True)
        return cls(offsets, features.to(torch.int32), width)


def weighted_rows(values: Tensor, active: Active, matrix: Tensor) -> Tensor:
    """`A @ matrix` where `A (n, width)` holds `values`: `(width, d) -> (n, d)`."""
    return bags(matrix, active.features, active.offsets[:-1], values)


def weighted_features(values: Tensor, active: Active, matrix: Tensor) -> Tensor:
    """`A.T @ matrix`: `(n, d) -> (width, d)`."""
    order, starts = active.by_feature
    return bags(matrix, active.row_of[order], starts, values[order])


def sum_by_feature(values: Tensor, active: Active) -> Tensor:
    """`A.sum(0)`: `(width,)`."""
    return values.new_zeros(active.width).index_add_(0, active.features.long(), values)


def sampled(left: Tensor, active: Active, right: Tensor) -> Tensor:
    """`left @ right.T` at the active entries only: `(n, d), (width, d) -> (entries,)`."""
    if not len(active.features):
        return left.new_zeros(0)
    if left.device.type not in SAMPLES:
        return sampled_in_parts(left, active, right)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        where = torch.sparse_csr_tensor(
            active.offsets, active.features, left.new_zeros(len(active.features)), (active.rows, active.width),
            check_invariants=False,
        )  # fmt: skip
    return torch.sparse.sampled_addmm(where, left, right.T, beta=0.0).values()


def sampled_in_parts(left: Tensor, active: Active, right: Tensor) -> Tensor:
    """`sampled` where PyTorch has no sampled product, such as on MPS: some entries' rows at a time."""
    step = max(1, PART_NUMBERS // left.shape[1])
    parts = zip(active.row_of.long().split(step), active.features.long().split(step), strict=True)
    return torch.cat([(left[rows] * right[features]).sum(-1) for rows, features in parts])


def bags(matrix: Tensor, index: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of `matrix`, one per bag; an empty bag is zero."""
    if not len(index):
        return matrix.new_zeros(len(starts), matrix.shape[1])
    return embedding_bag(index, matrix, starts, mode="sum", per_sample_weights=weights)


class Encode(torch.autograd.Function):
    """`W_enc[f] . (x - b_dec) + b_enc[f]` at the active entries, whose values are known already.

    The residual is data and gets no gradient. `b_dec` is the pre-bias, or None: as every entry depends on it through
    `-W_enc[f] . b_dec` alone, its gradient is `-W_enc.T @ grad(b_enc)`.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, active: Active, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None
    ) -> Tensor:
        ctx.active, ctx.has_bias = active, b_dec is not None
        ctx.save_for_backward(x, W_enc, *([] if b_dec is None else [b_dec]))
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, *bias = ctx.saved_tensors
        seen = x - bias[0] if bias else x
        to_W = weighted_features(grads[0], ctx.active, seen)
        to_b = sum_by_feature(grads[0], ctx.active)
        return None, None, None, to_W, to_b, -(to_b @ W_enc) if bias else None


class Decode(torch.autograd.Function):
    """`A @ W_dec`, with the decoder's rows as features: `(entries,), (width, d_model) -> (n, d_model)`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, active: Active, W_dec: Tensor) -> Tensor:
        ctx.active = active
        ctx.save_for_backward(values, W_dec)
        return weighted_rows(values, active, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        grad = grads[0].contiguous()
        return sampled(grad, ctx.active, W_dec), None, weighted_features(values, ctx.active, grad)

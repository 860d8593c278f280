"""`FeatureActs`, the only currency of feature activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope.errors import InputError


@dataclass(frozen=True, eq=False)
class FeatureActs:
    """The active features of each token, without the zeros.

    Slots stand in descending value, equal values by lower feature index; an unused slot has value 0 and index 0.

    Attributes:
        indices: which features, `(..., k)` int32.
        values: how strongly, `(..., k)`, never negative.
        width: the number of features of the dictionary (`d_sae`).
    """

    indices: Int[Tensor, "*rows k"]
    values: Float[Tensor, "*rows k"]
    width: int

    def __post_init__(self) -> None:
        if self.indices.shape != self.values.shape:
            shapes = f"indices {tuple(self.indices.shape)} and values {tuple(self.values.shape)}"
            raise InputError(f"{shapes} differ in shape")

    @property
    def shape(self) -> torch.Size:
        """The shape of the rows: everything before the slots."""
        return self.values.shape[:-1]

    @property
    def k(self) -> int:
        """How many slots a row has."""
        return self.values.shape[-1]

    def __getitem__(self, rows: int | slice | Tensor | tuple) -> FeatureActs:
        """The chosen rows; the slots can't be indexed."""
        rows = rows if isinstance(rows, tuple) else (rows,)
        if len(rows) > len(self.shape):
            raise InputError(f"{len(rows)} indices for rows of {len(self.shape)} dimensions")
        return FeatureActs(self.indices[rows], self.values[rows], self.width)

    def to(self, device: torch.device | str) -> FeatureActs:
        """The same activations on `device`."""
        return FeatureActs(self.indices.to(device), self.values.to(device), self.width)

    def reshape(self, *rows: int) -> FeatureActs:
        """The same activations with the rows in another shape; one of `rows` may be -1."""
        if -1 in rows:
            # Said in full, because a tensor without slots leaves the missing number open.
            known = math.prod(n for n in rows if n != -1)
            rows = tuple(self.shape.numel() // max(1, known) if n == -1 else n for n in rows)
        return FeatureActs(self.indices.reshape(*rows, self.k), self.values.reshape(*rows, self.k), self.width)

    def active(self) -> Int[Tensor, "*rows"]:
        """L0: the number of active features of each row."""
        return (self.values > 0).sum(-1)

    def select(self, features: Sequence[int] | Int[Tensor, " n"]) -> Float[Tensor, "*rows n"]:
        """The activation of each of `features` on each row, 0 where it is not active.

        Raises:
            InputError: a feature is outside `[0, width)` or named twice.
        """
        wanted = torch.as_tensor(features, dtype=torch.long, device=self.indices.device)
        bad = wanted[(wanted < 0) | (wanted >= self.width)]
        if bad.numel():
            raise InputError(
                f"feature {int(bad[0])} does not exist: this dictionary has features 0 to {self.width - 1}"
            )
        if wanted.unique().numel() != wanted.numel():
            raise InputError("a feature is named twice")
        # One spare column takes every slot that nobody asked for.
        column = torch.full((self.width,), wanted.numel(), dtype=torch.long, device=wanted.device)
        column[wanted] = torch.arange(wanted.numel(), device=wanted.device)
        out = self.values.new_zeros(*self.shape, wanted.numel() + 1)
        return out.scatter_add(-1, column[self.indices.long()], self.values)[..., :-1]

    def to_dense(self) -> Float[Tensor, "*rows width"]:
        """Every feature of every row, `(..., width)`: for tests and small inputs."""
        dense = self.values.new_zeros(*self.shape, self.width)
        return dense.scatter_add(-1, self.indices.long(), self.values)

    @classmethod
    def from_dense(cls, dense: Float[Tensor, "*rows width"], k: int | None = None) -> FeatureActs:
        """The `k` largest positive entries of each row; by default as many as the fullest row has."""
        width = dense.shape[-1]
        if k is None:
            k = int((dense > 0).sum(-1).max()) if dense.numel() else 0
        values, indices = dense.clamp(min=0).sort(dim=-1, descending=True, stable=True)
        return cls._from_sorted(values[..., :k], indices[..., :k], width)

    @classmethod
    def _from_sorted(cls, values: Tensor, indices: Tensor, width: int) -> FeatureActs:
        return cls(torch.where(values > 0, indices, 0).to(torch.int32), values, width)

    @classmethod
    def cat(cls, parts: Sequence[FeatureActs]) -> FeatureActs:
        """Rows one after the other, along the first dimension; narrower parts get unused slots.

        Raises:
            InputError: no parts, or parts of dictionaries of different widths.
        """
        if len({part.width for part in parts}) != 1:
            raise InputError("activations of one dictionary can be joined; these have none or several widths")
        k = max(part.k for part in parts)
        pad = [(0, k - part.k) for part in parts]
        indices = torch.cat([torch.nn.functional.pad(p.indices, w) for p, w in zip(parts, pad, strict=True)])
        values = torch.cat([torch.nn.functional.pad(p.values, w) for p, w in zip(parts, pad, strict=True)])
        return cls(indices, values, parts[0].width)

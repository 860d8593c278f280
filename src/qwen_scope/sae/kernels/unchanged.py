"""What tells weights apart that were written to behind PyTorch's back, and features that are copies of each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows that are summed at a time: few enough to stay in cache between the sum over rows and the one over columns.
ROWS = 64
# Any odd number: it only has to keep the sums of rows and biases from cancelling.
ODD = 0x9E3779B97F4A7C1


@dataclass(frozen=True, eq=False)
class Checksums:
    """The raw bits of an encoder as whole numbers, summed over every row and over every column, and of its bias.

    Sums are exact, so a write that is not seen has to leave every row's and every column's sum as it was: no change of
    one number, of one row or of one column does, nor any that moves rows or columns about.
    """

    rows: Tensor
    columns: Tensor
    bias: Tensor

    def same_as(self, other: Checksums) -> bool:
        return all(
            torch.equal(mine, theirs)
            for mine, theirs in ((self.rows, other.rows), (self.columns, other.columns), (self.bias, other.bias))
        )


@torch.no_grad()
def checksums(W_enc: Tensor, b_enc: Tensor) -> Checksums:
    """The sums of an encoder `(d_sae, d_model)`: one read of it, at the speed of memory."""
    numbers = bits(W_enc)
    columns = torch.zeros(numbers.shape[1], dtype=torch.int64, device=W_enc.device)
    rows = []
    for part in numbers.split(ROWS if W_enc.device.type == "cpu" else len(numbers)):
        rows.append(part.sum(1))
        columns += part.sum(0)
    return Checksums(torch.cat(rows), columns, bits(b_enc[:, None]).sum(1))


def bits(matrix: Tensor) -> Tensor:
    """The same memory as whole numbers, as wide as the rows allow: `(n, m)` to `(n, m * itemsize / 8)` at best."""
    matrix = matrix.detach()
    size, offset = matrix.element_size(), matrix.storage_offset() * matrix.element_size()
    wide = matrix.is_contiguous() and matrix.shape[1] * size % 8 == 0 and offset % 8 == 0
    return matrix.view(torch.int64 if wide else {2: torch.int16, 4: torch.int32}[size])


@dataclass(frozen=True, eq=False)
class Twins:
    """Features that are copies of each other, encoder and bias, to the bit.

    A matrix product may add up the same numbers in another order at another place, so equal features could get values
    that differ in the last bit; they get one value instead, and then the lower index comes first.

    Attributes:
        features: every one that has a copy, `(n,)`.
        first: for each of them the lowest feature that it equals, `(n,)`.
    """

    features: Tensor
    first: Tensor

    def still(self, W_enc: Tensor, b_enc: Tensor) -> bool:
        """Whether they are still copies of each other."""
        return torch.equal(W_enc[self.features], W_enc[self.first]) and torch.equal(
            b_enc[self.features], b_enc[self.first]
        )


@torch.no_grad()
def twins(W_enc: Tensor, b_enc: Tensor, sums: Checksums) -> Twins | None:
    """The copies among the features; None where all differ. Features that can never be active are left out."""
    order = (sums.rows * ODD + sums.bias).unique(return_inverse=True)[1]
    counts = order.bincount()
    alike = (counts[order] > 1).nonzero().flatten()
    if not len(alike):
        return None
    alike = alike[(W_enc[alike] != 0).any(1) | (b_enc[alike] > 0)]
    first: dict[int, list[int]] = {}
    pairs = []
    for feature, group in zip(alike.tolist(), order[alike].tolist(), strict=True):
        known = first.setdefault(group, [])
        equal = next((f for f in known if torch.equal(W_enc[f], W_enc[feature]) and b_enc[f] == b_enc[feature]), None)
        if equal is None:
            known.append(feature)
        else:
            pairs.append((feature, equal))
    if not pairs:
        return None
    members = sorted({*pairs, *((equal, equal) for _, equal in pairs)})
    both = torch.tensor(members, device=W_enc.device)
    return Twins(both[:, 0].contiguous(), both[:, 1].contiguous())

"""What choosing by a screen gives, whichever way it is done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from .bound import Rows

# At most this many candidates for each slot, and as many more for the row; beyond, the full product costs less.
PER_SLOT, PER_ROW = 8, 256

# The bf16 product of successive rows, each in place of the one before, with the rows it was taken of. Triton's and
# PyTorch's choices take one.
Tiles: TypeAlias = Iterator[tuple[Tensor, Rows]]


@dataclass(frozen=True, eq=False)
class Candidates:
    """The answer for a tile: `values, features (n, k)`, and whether each row is certified.

    Rows without a certificate hold nothing of use.
    """

    values: Tensor
    features: Tensor
    certified: Tensor
    candidates: int

"""What choosing by a screen gives, whichever way it is done."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# At most this many candidates for each slot, and as many more for the row; beyond, the full product costs less.
PER_SLOT, PER_ROW = 8, 256


@dataclass(frozen=True, eq=False)
class Candidates:
    """The answer for a tile: `values, features (n, k)`, and whether each row is certified.

    Rows without a certificate hold nothing of use.
    """

    values: Tensor
    features: Tensor
    certified: Tensor
    candidates: int

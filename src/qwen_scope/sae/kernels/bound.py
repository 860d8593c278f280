"""How far a low-precision pre-activation can be from the fp32 one, proven; `docs/encode.md` derives it.

Everything is per SAE (prepared once) or per row, so that the bound of any (row, feature) is a short sum of products.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Members of a group; feature j stands in group j % groups, so group maxima are a maximum over contiguous slabs.
MEMBERS = 32
# Columns after the d_model ordinary ones: three pieces of the bias, and five products for each massive dimension.
EXTRA, BIAS_PIECES, MASSIVE, PER_MASSIVE = 32, 3, 5, 5
# A dimension is massive where it holds this many times its even share of a row's square norm, on average.
SHARE = 16.0
# The unit roundoff of bf16 with room for the fp32 rounding of whoever evaluates the bound.
ROUND_OUT = 2.0**-8 * (1 + 2.0**-6)
TINY = 2.0**-120
LARGEST_NORM = 2.0**50
# The root of the squares that vanish in fp32, and what matrix units read as zero.
VANISHED = 2.0**-56
# Weights are prepared in pieces of this many numbers, which stay in cache and in memory that is there already.
PREPARE_NUMBERS = 2**17
# Up to this width a norm taken in fp32 is off by less than the room that is added to it.
WIDEST = 2**14


@dataclass(eq=False)
class Screen:
    """One SAE's encoder in bf16, and what rounding took from each feature.

    Attributes:
        low: `(groups * MEMBERS, d_model + EXTRA)` bf16; rows beyond `d_sae` are zero.
        per_feature: `(groups * MEMBERS, 4)` fp32: the norm of the rounding residue, the norm of the feature, the norm
            of its massive dimensions, and a part that no row scales.
        per_group: `(groups, 4)`: the maxima of `per_feature` over each group.
        massive: the dimensions that are kept to fp32, at most MASSIVE.
        usable: whether every weight is finite and of a norm the derivation covers.
        lock: held while `massive` or the columns behind it change, and while they are used.
    """

    low: Tensor
    per_feature: Tensor
    per_group: Tensor
    d_sae: int
    usable: bool
    massive: tuple[int, ...] = ()
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def groups(self) -> int:
        return len(self.per_group)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for one SAE."""
        return sum(t.numel() * t.element_size() for t in (self.low, self.per_feature, self.per_group))


@dataclass(frozen=True, eq=False)
class Rows:
    """A tile of residuals in bf16, and what rounding took from each.

    Attributes:
        low: `(n, d_model + EXTRA)` bf16.
        terms: `(n, 4)` fp32: what multiplies the four columns of `Screen.per_feature`; the last is 1.
        covered: `(n,)` whether the derivation covers the row: finite, and not of an absurd norm.
    """

    low: Tensor
    terms: Tensor
    covered: Tensor


def gamma(terms: int) -> float:
    """Relative error of a sum of products in fp32, in any order, rounded to nearest or truncated, computed twice."""
    n = (terms + 2) * (2.0**-23 + 2.0**-24)
    return n / (1 - n)


def norm(x: Tensor) -> Tensor:
    """The norm of each row in float64, where squares of fp32 numbers neither overflow nor vanish."""
    return torch.linalg.vector_norm(x.double(), dim=1)


def pieces(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three bf16 numbers whose sum is `x`, exact but for what is below the smallest of them."""
    first = x.to(torch.bfloat16)
    second = (x - first).to(torch.bfloat16)
    return first, second, (x - first - second).to(torch.bfloat16)


@torch.no_grad()
def prepare(W_enc: Float[Tensor, "d_sae d_model"], b_enc: Float[Tensor, " d_sae"]) -> Screen:
    """The bf16 copy of an encoder and the norms its bound is made of; a few times a read of the weights."""
    d_sae, d_model = W_enc.shape
    width = -(-d_sae // MEMBERS) * MEMBERS
    low = torch.empty(width, d_model + EXTRA, dtype=torch.bfloat16, device=W_enc.device)
    low[:, d_model:] = 0
    low[d_sae:] = 0
    norms = torch.zeros(width, 4, dtype=torch.float64, device=W_enc.device)
    step = max(1, PREPARE_NUMBERS * (1 if W_enc.device.type == "cpu" else 256) // d_model)
    for start in range(0, d_sae, step):
        rows = slice(start, min(start + step, d_sae))
        exact = W_enc[rows].float()
        near = low[rows, :d_model].copy_(exact)
        norms[rows, 1] = torch.linalg.vector_norm(exact, dim=1)
        norms[rows, 0] = torch.linalg.vector_norm(exact - near, dim=1)
    bias = b_enc.float()
    parts = pieces(bias)
    low[:d_sae, d_model : d_model + BIAS_PIECES] = torch.stack(parts, 1)
    lost = (bias.double() - sum(p.double() for p in parts)).abs()
    terms = d_model + EXTRA
    norms[:d_sae, 3] = lost + gamma(terms) * bias.double().abs()
    norms[:, :2] += VANISHED
    norms[:, 3] += 16 * terms * 2.0**-126
    fits = norms.isfinite().all() and (norms[:, 1] <= LARGEST_NORM).all() and (bias.abs() <= 2.0**100).all()
    usable = d_model <= WIDEST and bool(fits)
    per_feature = (norms * (1 + 2.0**-10)).clamp_(min=TINY).float()
    return Screen(low, per_feature, per_group(per_feature), d_sae, usable)


def per_group(per_feature: Tensor) -> Tensor:
    """The maxima over each group, `(groups * MEMBERS, 4) -> (groups, 4)`."""
    return per_feature.view(MEMBERS, -1, per_feature.shape[1]).amax(0)


@torch.no_grad()
def massive_dimensions(x: Float[Tensor, "n d_model"], sample: int = 256) -> tuple[int, ...]:
    """The dimensions that hold most of their row's norm, at most MASSIVE, judged by a sample and by every sink row."""
    norms = torch.linalg.vector_norm(x, dim=1)
    stride = max(1, len(x) // sample)
    chosen = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    chosen[::stride] = True
    chosen |= norms > 4 * norms.median()
    chosen &= norms.isfinite() & (norms > 0)
    rows = chosen.nonzero().flatten()[: 2 * sample]
    if not len(rows):
        return ()
    share = (x[rows] / norms[rows, None]).square().mean(0) * x.shape[1]
    found = share.topk(min(MASSIVE, len(share)))
    return tuple(sorted(found.indices[found.values > SHARE].tolist()))


@torch.no_grad()
def keep_massive(screen: Screen, W_enc: Tensor, dims: tuple[int, ...]) -> None:
    """Make `dims` the massive dimensions of `screen`, unless it keeps them all already."""
    if set(dims) <= set(screen.massive):
        return
    dims = (*dims, *(d for d in screen.massive if d not in dims))[:MASSIVE]
    d_sae, d_model = W_enc.shape
    exact = W_enc[:, list(dims)].float()
    first, second, third = pieces(exact)
    start = d_model + BIAS_PIECES
    columns = torch.stack([second, third, first, second, first], -1).flatten(1)
    screen.low[:d_sae, start:] = 0
    screen.low[:d_sae, start : start + columns.shape[1]] = columns
    screen.per_feature[:d_sae, 2] = (norm(exact) * (1 + 2.0**-10) + 2.0**-100).float()
    screen.per_group = per_group(screen.per_feature)
    screen.massive = dims


@torch.no_grad()
def lower_rows(x: Float[Tensor, "n d_model"], screen: Screen) -> Rows:
    """A tile of fp32 residuals in bf16, its massive dimensions in pieces, with the four terms of the bound."""
    n, d_model = x.shape
    low = torch.empty(n, d_model + EXTRA, dtype=torch.bfloat16, device=x.device)
    low[:, d_model:] = 0
    low[:, d_model : d_model + BIAS_PIECES] = 1
    near = low[:, :d_model].copy_(x)
    dims = list(screen.massive)
    big, rest, lost = x[:, dims], x, x - near
    if dims:
        first, second, third = pieces(big)
        start = d_model + BIAS_PIECES
        columns = torch.stack([first, first, second, second, third], -1).flatten(1)
        low[:, start : start + columns.shape[1]] = columns
        lost[:, dims] = 0
        rest = x.index_fill(1, torch.tensor(dims, device=x.device), 0)
    # Few numbers are worth float64; for a whole row fp32 is within the room added below, but for squares that vanish.
    big_norm = torch.linalg.vector_norm(big.double(), dim=1)
    small = torch.linalg.vector_norm(rest, dim=1).double() + VANISHED
    lost_norm = torch.linalg.vector_norm(lost, dim=1).double() + VANISHED
    error = gamma(d_model + EXTRA)
    # Rounded numbers, and pieces together, are at most 1 + 2**-6 times as large as the exact ones.
    scaled = error * (1 + 2.0**-6) ** 2
    terms = torch.stack(
        [
            small + lost_norm,
            # The last is for subnormal numbers, which matrix units read as zero.
            lost_norm + scaled * small + 2.0**-115,
            (scaled + 2.0**-22) * big_norm,
            torch.ones_like(small),
        ],
        1,
    )
    covered: Bool[Tensor, " n"] = (small.square() + big_norm.square()).sqrt() <= LARGEST_NORM
    # Matrix units may read past a row's end and multiply by zero what they find, which NaN and infinity survive.
    low[~covered] = 0
    terms = torch.where(covered[:, None], terms * (1 + 2.0**-10), 0).clamp_(min=TINY)
    return Rows(low, terms.float(), covered)


def bound(rows: Rows, per: Tensor) -> Tensor:
    """The largest distance before the product is rounded to bf16, `(n, features or groups)`.

    With `value` the rounded product, the fp32 pre-activation is within `bound + ROUND_OUT * |value|` of it.
    """
    total = rows.terms[:, 0, None] * per[:, 0]
    for column in (1, 2, 3):
        total.addcmul_(rows.terms[:, column, None], per[:, column])
    return total

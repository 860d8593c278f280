"""Exact top k at low-precision speed: screen in bf16, keep all that the bound cannot rule out, recompute it in fp32."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError

from ..acts import FeatureActs
from . import numba, triton
from .bound import ROUND_OUT, Screen, bound, keep_massive, lower_rows, massive_dimensions
from .candidates import PER_ROW, PER_SLOT, Candidates, Tiles
from .tiled import encode_topk, rows_per_tile
from .unchanged import Twins

# The bf16 pre-activations of one tile; the rest of a tile's working memory is a few times this.
SCREEN_BYTES = 32 * 2**20
SCREEN_BYTES_ON_GPU = 2**30


@dataclass(frozen=True)
class EncodeStats:
    """Which way a call of encode went.

    Attributes:
        path: `plain` (fp32 products only), `screened` (PyTorch alone), `screened+numba` (numba) or
            `screened+triton`.
        rows: how many rows were encoded.
        fallback: how many of them had no certificate and took the full fp32 product, 0 on the plain path.
        candidates: how many pre-activations were recomputed in fp32, 0 on the plain path.
    """

    path: str
    rows: int
    fallback: int = 0
    candidates: int = 0


@torch.no_grad()
def encode_topk_screened(
    x: Float[Tensor, "*rows d_model"],
    W_enc: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    screen: Screen,
    tile_bytes: int | None = None,
    use_numba: bool | None = None,
    use_triton: bool | None = None,
    twins: Twins | None = None,
) -> tuple[FeatureActs, EncodeStats]:
    """`encode_topk_reference` by certified screening; every row comes back exact, screened or not.

    Args:
        screen: `bound.prepare(W_enc, b_enc)`.
        tile_bytes: the size of one tile of bf16 pre-activations.
        use_numba: whether numba chooses and recomputes; by default where it is installed and reads this type.
        use_triton: whether Triton does; by default on CUDA.
        twins: features that are copies of each other, for the rows that fall back.

    Raises:
        InputError: the weights or k can't be screened (`can_screen` tells).
    """
    name, choose, together = way_of(W_enc, use_numba, use_triton)
    if not can_screen(W_enc, k, screen) or (name == "screened" and W_enc.dtype != torch.float32):
        raise InputError(f"an encoder of shape {tuple(W_enc.shape)} in {W_enc.dtype} with k {k} can't be screened")
    device, d_sae = W_enc.device, len(W_enc)
    rows = x.reshape(-1, x.shape[-1]).to(device)
    values = torch.zeros(len(rows), k, device=device)
    features = torch.zeros(len(rows), k, dtype=torch.int32, device=device)
    certified = torch.zeros(len(rows), dtype=torch.bool, device=device)
    product = torch.mm if device.type == "cpu" else triton.product
    tile_bytes = tile_bytes or (SCREEN_BYTES if device.type == "cpu" else SCREEN_BYTES_ON_GPU)
    candidates = 0
    with screen.lock:
        keep_massive(screen, W_enc, massive_dimensions(rows.float()))
        step = min(rows_per_tile(len(screen.low), 2 * tile_bytes), max(1, len(rows)))
        # One tile for all products: fresh pages would cost a tenth of them.
        room = torch.empty(step, len(screen.low), dtype=torch.bfloat16, device=device)
        block = step * max(1, together // step)
        for start in range(0, len(rows), block):
            part = slice(start, start + block)
            x_part = rows[part].float().contiguous()
            lowered = (lower_rows(tile, screen) for tile in x_part.split(step))
            tiles = ((product(tile.low, screen.low.T, out=room[: len(tile.low)]), tile) for tile in lowered)
            found = choose(tiles, x_part, W_enc, b_enc, k, screen)
            values[part], features[part], certified[part] = found.values, found.features, found.certified
            candidates += found.candidates
    left = (~certified).nonzero().flatten()
    if len(left):
        plain = encode_topk(rows[left], W_enc, b_enc, k, twins=twins)
        values[left], features[left] = plain.values, plain.indices
    acts = FeatureActs(features, values, d_sae).reshape(*x.shape[:-1])
    return acts, EncodeStats(name, len(rows), len(left), candidates)


def way_of(
    W_enc: Tensor, use_numba: bool | None, use_triton: bool | None
) -> tuple[str, Callable[..., Candidates], int]:
    """What chooses and recomputes, with its name and how many rows it recomputes together; 0 for those of a tile."""
    if W_enc.is_cuda if use_triton is None else use_triton:
        return "screened+triton", triton.choose, 0
    if numba.reads(W_enc) if use_numba is None else use_numba:
        return "screened+numba", numba.choose, numba.rows_at_once(W_enc)
    return "screened", choose_candidates, 0


def can_screen(W_enc: Tensor, k: int, screen: Screen) -> bool:
    """Whether the derivation covers these weights and there are groups enough to choose k features by."""
    return screen.usable and 2 * k <= screen.groups and W_enc.is_contiguous() and W_enc.device.type in ("cpu", "cuda")


def low_is_fast(W_enc: Tensor) -> bool:
    """Whether the device of these weights multiplies bf16 much faster than fp32, in the way the bound rests on."""
    if W_enc.device.type == "cpu":
        # numba reads bf16 weights, PyTorch alone does not.
        return (W_enc.dtype == torch.float32 or numba.reads(W_enc)) and cpu_multiplies_bf16()
    return W_enc.dtype in (torch.float32, torch.bfloat16) and triton.multiplies_bf16(W_enc.device)


def choose_candidates(tiles: Tiles, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, screen: Screen) -> Candidates:
    """The k largest of each row of a tile, from its bf16 product `low (n, groups * MEMBERS)`.

    The k-th largest lower bound of any k features is a floor under the k-th largest pre-activation, and group maxima
    provide k of them; whatever cannot reach the floor is out.
    """
    ((low, rows),) = tiles
    n, groups = len(low), screen.groups
    grouped = low.view(n, -1, groups)
    # As integers, positive bf16 numbers keep their order and negative ones stay below; there is no NaN in covered rows.
    best = grouped.view(torch.int16).amax(1).clamp_(min=0).view(torch.bfloat16).float()
    slack = bound(rows, screen.per_group)
    floor = (best * (1 - ROUND_OUT) - slack).topk(k, dim=1).values[:, -1].clamp_(min=0)
    reach = best * (1 + ROUND_OUT) + slack
    passing = (reach >= floor[:, None]).sum(1)
    kept = int(passing.clamp(max=4 * k).max()) if n else 0
    certified = rows.covered & (passing <= kept)
    where = reach.topk(kept, dim=1, sorted=False).indices
    wide = where[:, None, :].expand(-1, grouped.shape[1], -1)
    approx = grouped.gather(2, wide).float()
    mask = approx + approx.abs() * ROUND_OUT + slack.gather(1, where)[:, None, :] >= floor[:, None, None]
    mask &= certified[:, None, None]
    row, member, slot = mask.nonzero(as_tuple=True)
    feature = member * groups + where[row, slot]
    value = approx[row, member, slot]
    del approx, mask
    # The same again with each feature's own bound instead of its group's.
    own = (rows.terms[row] * screen.per_feature[feature]).sum(1) * (1 + 2.0**-20)
    keep = (value + value.abs() * ROUND_OUT + own >= floor[row]) & (feature < screen.d_sae)
    row, feature = row[keep], feature[keep]
    counts = row.bincount(minlength=n)
    certified &= counts <= PER_SLOT * k + PER_ROW
    keep = certified[row]
    key = (row[keep] * screen.d_sae + feature[keep]).sort().values
    row, feature = key // screen.d_sae, key % screen.d_sae
    exact = recomputed(x, W_enc, row, feature) + b_enc.float()[feature]
    return largest_of(exact.relu_(), row, feature, certified, k)


def recomputed(x: Tensor, W_enc: Tensor, row: Tensor, feature: Tensor) -> Tensor:
    """`x[row] . W_enc[feature]` for entries in order of their rows, without gathering either."""
    starts = torch.searchsorted(row, torch.arange(len(x) + 1)).int()
    if not len(row):
        return x.new_zeros(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        where = torch.sparse_csr_tensor(
            starts, feature.int(), x.new_zeros(len(feature)), (len(x), len(W_enc)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(where, x, W_enc.T, beta=0.0).values()


def largest_of(exact: Tensor, row: Tensor, feature: Tensor, certified: Tensor, k: int) -> Candidates:
    """The k largest of entries in order of row and feature: equal values keep the lower feature first."""
    n = len(certified)
    counts = row.bincount(minlength=n)
    width = max(k, int(counts.max()) if n else 0)
    slot = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    values = exact.new_zeros(n, width)
    features = torch.zeros(n, width, dtype=torch.int32)
    values[row, slot], features[row, slot] = exact, feature.int()
    values, order = values.sort(dim=1, descending=True, stable=True)
    values, features = values[:, :k], features.gather(1, order[:, :k])
    return Candidates(values, torch.where(values > 0, features, 0), certified, len(row))


@lru_cache(maxsize=1)
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 instructions and PyTorch's product adds them up in fp32, which the bound rests on.

    The second is tried: 256 plus many halves stays 256 where sums are kept in bf16. A process that was told to do
    without AVX-512 (`ATEN_CPU_CAPABILITY`) does without these too.
    """
    has = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    has = has and torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")
    has = has and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    if not has:
        return False
    left = torch.full((32, 1025), 0.5, dtype=torch.bfloat16)
    left[:, 0] = 256
    return bool((torch.mm(left, torch.ones(1025, 32, dtype=torch.bfloat16)) == 768).all())

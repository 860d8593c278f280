"""Which features are active: the largest of each row, over one dictionary or over the slices of one."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_scope.sae import kernels

from .parallel import Ranks
from .sparse import Active

# The largest tile of pre-activations: small enough to stay in cache between the product and the choice.
TILE_BYTES = 16 * 2**20
GROUPS = 8

# From this number of rows on, a bf16 product and preparing it cost less than the fp32 product.
SCREEN_ROWS = 512

# Below this share of the dictionary, gathering the rows asked for costs less than masking the full product.
GATHER_SHARE = 1 / 2


def tiles(x: Tensor, d_sae: int, tile_bytes: int) -> tuple[Tensor, ...]:
    """`x (n, d_model)` cut so that the pre-activations of one piece fit the budget."""
    return x.split(max(1, tile_bytes // (x.element_size() * d_sae)))


def top_entries(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, among: Tensor | None = None, tile_bytes: int = TILE_BYTES
) -> tuple[Tensor, Tensor]:
    """The k largest of `relu(x @ W_enc.T + b_enc)` of each row: values and features `(n, k)`, in no order.

    Rows are taken in tiles, so no `(n, d_sae)` tensor exists. Where the CPU multiplies bf16, the product only screens,
    and the values are fp32 ones all the same (`docs/encode.md`).

    Args:
        among: only these features count, `(d_sae,)` bool. Where fewer than k do, there are fewer columns.
    """
    if among is not None:
        wanted = among.nonzero().flatten()
        k = min(k, len(wanted))
        if len(wanted) <= GATHER_SHARE * len(W_enc):
            values, features = top_entries(x, W_enc[wanted], b_enc[wanted], k, tile_bytes=tile_bytes)
            return values, wanted[features]
        # An absent feature's pre-activation is minus infinity, which the product can't change.
        b_enc = torch.where(among, b_enc, -torch.inf)
    if k == 0:
        return x.new_zeros(len(x), 0), torch.zeros(len(x), 0, dtype=torch.int64, device=x.device)
    if among is None and len(x) >= SCREEN_ROWS and kernels.worth_screening(x, W_enc, b_enc):
        # The weights move at every step, so what screening needs is made anew.
        screen = kernels.prepare(W_enc.detach(), b_enc.detach())
        if kernels.can_screen(W_enc, k, screen):
            acts, _ = kernels.encode_topk_screened(x, W_enc.detach(), b_enc.detach(), k, screen)
            return acts.values, acts.indices
    found = [largest(kernels.linear_fp32(tile, W_enc, b_enc), k) for tile in tiles(x, len(W_enc), tile_bytes)]
    values, features = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values.relu_(), features


def largest(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in no order, by way of the k groups with the largest maxima, which hold them all."""
    n, width = pre.shape
    per_group = width // GROUPS
    if width % GROUPS or per_group < 2 * k:
        return tuple(pre.topk(k, dim=-1, sorted=False))  # pyright: ignore[reportReturnType]
    grouped = pre.view(n, GROUPS, per_group)
    best = grouped.amax(1).topk(k, dim=-1, sorted=False).indices
    members = grouped.gather(2, best[:, None, :].expand(-1, GROUPS, -1)).reshape(n, -1)
    values, slot = members.topk(k, dim=-1, sorted=False)
    return values, best.gather(1, slot % k) + torch.div(slot, k, rounding_mode="floor") * per_group


def best_of(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, ranks: Ranks, among: Tensor | None = None
) -> tuple[Tensor, Active]:
    """The k largest of each row over the whole dictionary: this slice's share of them, and their ReLU values."""
    values, features = top_entries(x, W_enc, b_enc, min(k, len(W_enc)), among)
    width = len(W_enc)
    if ranks.mode != "features":
        return values.flatten(), Active.of_slots(features, width)
    # Slices may have different numbers of candidates: a missing one is a zero, which is never active.
    offered = torch.nn.functional.pad(values, (0, min(k, width) - values.shape[1]))
    chosen = ranks.all_candidates(offered).topk(k, dim=-1).indices - ranks.rank * offered.shape[1]
    mine = torch.zeros(*offered.shape[:1], offered.shape[1] + 1, dtype=torch.bool, device=x.device)
    mine.scatter_(1, torch.where((chosen >= 0) & (chosen < offered.shape[1]), chosen, offered.shape[1]), True)
    return of_mask(values, features, mine[:, : values.shape[1]], width)


def best_of_batch(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, ranks: Ranks) -> tuple[Tensor, Active]:
    """The `k * n` largest ReLU pre-activations of the whole batch of n rows; a row may have more or fewer than k.

    Each row offers its largest few; if any row could have had more to give, all offer twice as many.
    """
    width = len(W_enc)
    n = int(ranks.over_rows(torch.tensor(len(x), device=x.device)))
    offers = min(width, 4 * k)
    while True:
        values, features = top_entries(x, W_enc, b_enc, offers)
        everyone = ranks.all_rows(ranks.all_candidates(values).flatten())
        enough = min(k * n, len(everyone))
        threshold = everyone.topk(enough).values[-1]
        cut_off = torch.as_tensor((values.amin(1) > threshold).any(), dtype=torch.int64)
        if offers == width or not ranks.over_both(cut_off):
            return of_mask(values, features, (values >= threshold) & (values > 0), width)
        offers = min(width, 2 * offers)


def of_mask(values: Tensor, features: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Active]:
    """The entries under a mask, all three `(n, c)`."""
    rows = mask.nonzero()[:, 0]
    return values[mask], Active.of_entries(rows, features[mask], len(mask), width)


def above(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, tile_bytes: int = TILE_BYTES
) -> tuple[Tensor, Active]:
    """All pre-activations above a threshold per feature and above zero."""
    values, rows, features, start = [], [], [], 0
    for tile in tiles(x, len(W_enc), tile_bytes):
        pre = torch.addmm(b_enc, tile, W_enc.T)
        # Written so that NaN passes and is found where the loss is checked.
        mask = ~(pre <= threshold.clamp(min=0))
        where = mask.nonzero()
        values.append(pre[mask])
        rows.append(where[:, 0] + start)
        features.append(where[:, 1])
        start += len(tile)
    return torch.cat(values), Active.of_entries(torch.cat(rows), torch.cat(features), len(x), len(W_enc))

"""Two texts side by side: which features are active on one and not on the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.sae import FeatureActs


@dataclass(frozen=True)
class Comparison:
    """One feature at one layer in two texts.

    Attributes:
        layer, feature: which.
        rate_a, rate_b: the share of each text's kept tokens on which it is active.
        difference: `rate_a - rate_b`.
    """

    layer: int
    feature: int
    rate_a: float
    rate_b: float
    difference: float


def kept_tokens(
    a: Sequence[int],
    b: Sequence[int],
    *,
    drop_first: bool = False,
    drop_common: bool = False,
    drop_prefix: bool = False,
) -> tuple[Bool[Tensor, " a"], Bool[Tensor, " b"]]:
    """Which tokens of two texts (as ids) count in a comparison.

    Args:
        drop_first: leave out the first token of each, which often carries a huge residual.
        drop_common: leave out every token whose id occurs in both.
        drop_prefix: leave out the longest common beginning.

    Raises:
        InputError: nothing would be left of one of them.
    """
    keep_a, keep_b = torch.ones(len(a), dtype=torch.bool), torch.ones(len(b), dtype=torch.bool)
    if drop_first:
        keep_a[:1] = keep_b[:1] = False
    if drop_prefix:
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        keep_a[:same] = keep_b[:same] = False
    if drop_common:
        common = set(a) & set(b)
        keep_a &= torch.tensor([x not in common for x in a])
        keep_b &= torch.tensor([x not in common for x in b])
    for name, keep in (("first", keep_a), ("second", keep_b)):
        if not keep.any():
            raise InputError(f"nothing is left of the {name} text to compare; drop fewer of its tokens")
    return keep_a, keep_b


def rates(acts: FeatureActs) -> Float[Tensor, " width"]:
    """The share of rows on which each feature is active."""
    on = acts.indices[acts.values > 0].long()
    return torch.bincount(on, minlength=acts.width).double() / max(1, acts.shape.numel())


def compare_rates(layer: int, a: FeatureActs, b: FeatureActs, n: int | None = None) -> list[Comparison]:
    """Features ranked by the difference of activation rate, largest first, equal ones by lower index.

    The measure of the official demo: rate = share of tokens where the activation is above 0.

    Args:
        a, b: activations of the kept tokens, `(tokens, k)`.
        n: how many; by default every feature active in either.
    """
    rate_a, rate_b = rates(a), rates(b)
    active = ((rate_a > 0) | (rate_b > 0)).nonzero().flatten()
    difference = (rate_a - rate_b)[active]
    order = difference.abs().sort(descending=True, stable=True).indices[:n]
    return [
        Comparison(layer, int(f), float(rate_a[f]), float(rate_b[f]), float(rate_a[f] - rate_b[f]))
        for f in active[order].tolist()
    ]

"""Two texts, or two sets of them, side by side: which features are active on one and not on the other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qwen_scope.errors import InputError, check_count
from qwen_scope.report import HasFrames, Table
from qwen_scope.sae import FeatureActs
from qwen_scope.text import phase_numbers

from .seen import TokenFeatures


@dataclass(frozen=True)
class Comparison:
    """One feature at one layer in two texts, or sets of texts.

    Attributes:
        layer, feature: which.
        rate_a, rate_b: the share of each side's kept tokens on which it is active.
        difference: `rate_a - rate_b`.
    """

    layer: int
    feature: int
    rate_a: float
    rate_b: float
    difference: float


@final
class Comparisons(dict[int, list[Comparison]], HasFrames):
    """Comparisons by layer, the largest difference first."""

    def sheet(self) -> Table:
        """A row per feature."""
        columns = [one.name for one in fields(Comparison)]
        return Table.of("Activation rates", [one for some in self.values() for one in some], columns)

    def __repr__(self) -> str:
        return f"Comparisons({sum(map(len, self.values())):,} features of layers {', '.join(map(str, self))})"


def compare_seen(
    seen: TokenFeatures,
    first: int,
    *,
    n: int | None = 5,
    drop_first: bool = False,
    drop_common: bool = False,
    drop_prefix: bool = False,
    phases: Collection[str] | None = None,
) -> Comparisons:
    """Per layer, the `n` features whose activation rates differ most between two sets of texts that were seen together.

    Rates are over the tokens that count.

    Args:
        first: how many of the texts, from the first on, are the one set; the others are the other set.
        drop_first, drop_common, drop_prefix: as in `kept_tokens`.
        phases: only tokens of these phases.

    Raises:
        InputError: an empty set, or nothing left to compare.
    """
    if n is not None:
        check_count("n", n)
    texts = len(seen.texts)
    if not 0 < first < texts:
        raise InputError(f"{first} of {texts} texts leave one side empty; a comparison needs texts on both")
    ids = [seen.input_ids[i][seen.mask[i]].tolist() for i in range(texts)]
    kept = kept_tokens(
        ids[:first], ids[first:], drop_first=drop_first, drop_common=drop_common, drop_prefix=drop_prefix
    )
    if phases is not None:
        wanted = phase_numbers(phases)
        kept = [keep & torch.from_numpy(np.isin(seen.source.phases(i)[1], wanted)) for i, keep in enumerate(kept)]
        check_left(kept[:first], kept[first:])
    found = Comparisons()
    for layer in seen.layers:
        here = [keep & seen.counts(i, layer) for i, keep in enumerate(kept)]
        check_left(here[:first], here[first:])
        a, b = (
            FeatureActs.cat([seen.of(i, layer)[here[i]] for i in side]) for side in (range(first), range(first, texts))
        )
        found[layer] = compare_rates(layer, a, b, n)
    return found


def kept_tokens(
    a: Sequence[Sequence[int]],
    b: Sequence[Sequence[int]],
    *,
    drop_first: bool = False,
    drop_common: bool = False,
    drop_prefix: bool = False,
) -> list[Bool[Tensor, " _"]]:
    """Which tokens of two sets of texts (as ids) count in a comparison: one mask per text, those of `a` first.

    Args:
        drop_first: leave out the first token of each text, which often carries a huge residual.
        drop_common: leave out every token whose id occurs in both sets.
        drop_prefix: leave out the longest beginning that all the texts share.

    Raises:
        InputError: nothing would be left of one of them.
    """
    texts = [*a, *b]
    kept = [torch.ones(len(ids), dtype=torch.bool) for ids in texts]
    same = 0
    if drop_prefix:
        shortest = min(map(len, texts))
        same = next((i for i in range(shortest) if len({ids[i] for ids in texts}) > 1), shortest)
    start = max(same, int(drop_first))
    common = {x for ids in a for x in ids} & {x for ids in b for x in ids} if drop_common else set()
    for ids, keep in zip(texts, kept, strict=True):
        keep[:start] = False
        if common:
            keep &= torch.tensor([x not in common for x in ids])
    check_left(kept[: len(a)], kept[len(a) :])
    return kept


def check_left(a: Sequence[Bool[Tensor, " _"]], b: Sequence[Bool[Tensor, " _"]]) -> None:
    """Raise InputError where no token of one side counts."""
    for name, side in (("first", a), ("second", b)):
        if not any(bool(keep.any()) for keep in side):
            what = "text" if len(side) == 1 else "set of texts"
            raise InputError(f"nothing is left of the {name} {what} to compare; drop fewer of its tokens, or count all")


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

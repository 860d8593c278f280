"""May I use these SAEs on another checkpoint? The same SAE on two models, the same tokens, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qwen_scope.errors import InputError, MismatchError
from qwen_scope.model import HookPoint, capture, d_model
from qwen_scope.report import Progress
from qwen_scope.sae import SAE, FeatureActs
from qwen_scope.text import Counted

from .evaluate import Moments, check_pairing

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95% interval, from resampling whole rows of text with replacement."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Transfer:
    """One layer's SAE on the model it was trained on and on another.

    Attributes:
        fvu_base, fvu_post: fraction of variance unexplained, each against the mean of its own model's residuals.
        fvu_rise: `fvu_post - fvu_base`, resampled together.
        jaccard: mean over tokens of the overlap of the two sets of active features, shared over all.
        cosine_base, cosine_post: mean cosine of residual and reconstruction.
        cosine_residuals: mean cosine of the two models' residuals.
    """

    fvu_base: Estimate
    fvu_post: Estimate
    fvu_rise: Estimate
    jaccard: Estimate
    cosine_base: Estimate
    cosine_post: Estimate
    cosine_residuals: Estimate

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


# The sums that are kept for every row of text.
SUMS = (
    "tokens",
    "error_base",
    "total_base",
    "error_post",
    "total_post",
    "jaccard",
    "cosine_base",
    "cosine_post",
    "cosine",
)


def transfer(
    base: nn.Module,
    post: nn.Module,
    saes: Mapping[HookPoint, SAE],
    rows: Sequence[Tensor],
    *,
    counted: Counted = Counted(),  # noqa: B008 - frozen
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[HookPoint, Transfer]:
    """Measure SAEs trained on `base` on both models.

    Args:
        rows: batches of full rows of token ids, `(rows, row)`, the same for both; gone through twice.
        counted: which tokens count, on both models alike: a token that is a sink on either one counts on neither. By
            default the first token of each row is left out alone.
        seed: of the resampling.

    Raises:
        InputError: fewer than two rows, which allow no interval, no SAE, or no token that counts on both.
        MismatchError: models of different widths or an SAE that does not fit them.
    """
    report = progress or (lambda stage, share, text: None)
    check_pairing(base, saes, rows)
    if d_model(base) != d_model(post):
        raise MismatchError(f"the models have {d_model(base)} and {d_model(post)} dimensions; SAEs move between equals")
    if sum(len(ids) for ids in rows) < 2:
        raise InputError("an interval needs at least two rows of text")
    points = list(saes)
    means = {(point, which): Moments(d_model(base)) for point in points for which in (0, 1)}
    for number, ids in enumerate(rows, 1):
        of_base, of_post = capture(base, ids, points), capture(post, ids, points)
        for point in points:
            keep = kept_on_both(counted, point, ids, of_base[point], of_post[point])
            for which, h in enumerate((of_base[point], of_post[point])):
                means[point, which].add(h[keep.to(h.device)])
        report("means", number / len(rows), f"{number} of {len(rows)}")
    for (point, _), moments in means.items():
        if not moments.n:
            raise InputError(f"every token at {point} is left out on one of the models; there is nothing to compare")
    sums: dict[HookPoint, list[Tensor]] = {point: [] for point in points}
    for number, ids in enumerate(rows, 1):
        of_base, of_post = capture(base, ids, points), capture(post, ids, points)
        for point, sae in saes.items():
            pair = of_base[point], of_post[point]
            keep = kept_on_both(counted, point, ids, *pair).cpu()
            sums[point].append(row_sums(sae, *pair, means[point, 0].mean, means[point, 1].mean, keep))
        report("transfer", number / len(rows), f"{number} of {len(rows)}")
    return {point: estimates(torch.cat(parts).numpy(), seed) for point, parts in sums.items()}


def kept_on_both(counted: Counted, point: HookPoint, ids: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The tokens that count at a layer, `(rows, row)` bool, given the residuals of both models."""
    return counted.keep(x, point, ids) & ~counted.sinks(y, point).to(x.device)


def row_sums(sae: SAE, x: Tensor, y: Tensor, mean_x: Tensor, mean_y: Tensor, keep: Tensor) -> Tensor:
    """The sums over the tokens of each row that count, `(rows, len(SUMS))` float64.

    Args:
        x, y: residuals of the two models, `(rows, row, d_model)`.   keep: which tokens count, `(rows, row)`.
    """
    a, b = sae.encode(x), sae.encode(y)
    x_hat, y_hat, x, y = (t.double().cpu() for t in (sae.decode(a), sae.decode(b), x, y))
    per_token = [
        torch.ones(x.shape[:2], dtype=torch.float64),
        (x - x_hat).square().sum(-1),
        (x - mean_x).square().sum(-1),
        (y - y_hat).square().sum(-1),
        (y - mean_y).square().sum(-1),
        jaccard(a, b).cpu(),
        torch.cosine_similarity(x, x_hat, dim=-1),
        torch.cosine_similarity(y, y_hat, dim=-1),
        torch.cosine_similarity(x, y, dim=-1),
    ]
    return torch.stack([torch.where(keep, each, 0.0).sum(1) for each in per_token], dim=1)


def jaccard(a: FeatureActs, b: FeatureActs) -> Tensor:
    """Of each row, the features active in both over those active in either, float64; 1 where neither has any."""
    both = torch.cat([distinct(a, a.width), distinct(b, a.width + a.k)], dim=-1).sort(dim=-1).values
    shared = (both[..., 1:] == both[..., :-1]).sum(-1)
    either = a.active() + b.active() - shared
    return torch.where(either > 0, shared / either.clamp(min=1).double(), 1.0)


def distinct(acts: FeatureActs, unused: int) -> Tensor:
    """The active features, and in unused slots numbers that nothing else has."""
    spare = torch.arange(unused, unused + acts.k, device=acts.indices.device)
    return torch.where(acts.values > 0, acts.indices.long(), spare)


def estimates(sums: np.ndarray, seed: int) -> Transfer:
    """Ratios of the column sums, and their percentile intervals over resampled rows."""
    n = len(sums)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    column = {name: sums[:, i] for i, name in enumerate(SUMS)}
    resampled = {name: draws @ values for name, values in column.items()}
    whole = {name: values.sum() for name, values in column.items()}

    def estimate(figure: Callable[[Mapping[str, Any]], Any]) -> Estimate:
        low, high = np.quantile(figure(resampled), [0.025, 0.975])
        return Estimate(float(figure(whole)), float(low), float(high))

    return Transfer(
        fvu_base=estimate(lambda s: s["error_base"] / s["total_base"]),
        fvu_post=estimate(lambda s: s["error_post"] / s["total_post"]),
        fvu_rise=estimate(lambda s: s["error_post"] / s["total_post"] - s["error_base"] / s["total_base"]),
        jaccard=estimate(lambda s: s["jaccard"] / s["tokens"]),
        cosine_base=estimate(lambda s: s["cosine_base"] / s["tokens"]),
        cosine_post=estimate(lambda s: s["cosine_post"] / s["tokens"]),
        cosine_residuals=estimate(lambda s: s["cosine"] / s["tokens"]),
    )

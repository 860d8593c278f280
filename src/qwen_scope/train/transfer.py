"""May I use these SAEs on another checkpoint? The same SAE on two models, the same tokens, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint
from qwen_scope.report import Progress
from qwen_scope.sae import SAE
from qwen_scope.stats import ClusterSums, Interval
from qwen_scope.text import Counted

from .pair import SUMS, jaccard, measure_pair
from .pair_rows import from_rows

__all__ = ["SUMS", "Estimate", "Transfer", "estimates", "jaccard", "transfer"]


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95% interval, from resampling whole documents with replacement."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, interval: Interval) -> Estimate:
        """The same as an interval of `stats`."""
        return cls(interval.estimate, interval.low, interval.high)


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
    if sum(len(ids) for ids in rows) < 2 and rows:
        raise InputError("an interval needs at least two rows of text")
    found = measure_pair(
        base, post, saes, from_rows(rows), counted=counted, counted_post=counted, loss=False, progress=progress
    )
    return {point: transferred(pair.by_document(), seed) for point, pair in found.items()}


def estimates(sums: np.ndarray, seed: int) -> Transfer:
    """Ratios of the column sums `(clusters, len(SUMS))`, and their percentile intervals over resampled clusters."""
    return transferred({name: sums[:, i] for i, name in enumerate(SUMS)}, seed)


def transferred(columns: Mapping[str, np.ndarray], seed: int) -> Transfer:
    """The figures of the columns `SUMS`, by document."""
    drawn = ClusterSums(columns, seed=seed)

    def estimate(figure: Callable[[Mapping[str, Any]], Any]) -> Estimate:
        return Estimate.of(drawn.interval(figure))

    return Transfer(
        fvu_base=estimate(lambda s: s["error_base"] / s["total_base"]),
        fvu_post=estimate(lambda s: s["error_post"] / s["total_post"]),
        fvu_rise=estimate(lambda s: s["error_post"] / s["total_post"] - s["error_base"] / s["total_base"]),
        jaccard=estimate(lambda s: s["jaccard"] / s["tokens"]),
        cosine_base=estimate(lambda s: s["cosine_base"] / s["tokens"]),
        cosine_post=estimate(lambda s: s["cosine_post"] / s["tokens"]),
        cosine_residuals=estimate(lambda s: s["cosine"] / s["tokens"]),
    )

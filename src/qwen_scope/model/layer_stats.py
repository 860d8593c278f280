"""`LayerStats`: how large residuals and features typically are at one hook point, from a stated sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qwen_scope.errors import FormatError, InputError
from qwen_scope.model.counted import Read
from qwen_scope.model.hookpoint import HookPoint
from qwen_scope.model.hooks import capture
from qwen_scope.text import Counted

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

# anonymous axes: batches may differ in size
Batch = tuple[Int[Tensor, "_ _"], Int[Tensor, "_ _"] | Bool[Tensor, "_ _"] | None]


@dataclass(frozen=True, eq=False)
class LayerStats:
    """Typical sizes at one hook point, measured on a sample.

    Attributes:
        hook_point: where it was measured.
        documents: how many rows of tokens the sample had.
        tokens: how many tokens that count.
        sample: what the sample was, in words.
        norm_median: the median L2 norm of the residual over tokens.
        norm_quantiles: quantiles of that norm, from the share of tokens below to the norm.
        feature_max: per feature of an SAE the largest activation, `(d_sae,)` float32, or None.
        firing_rate: per feature the share of tokens on which it is active, `(d_sae,)` float32, or None.

    Raises:
        InputError: an empty sample, a norm that is negative or not finite, or arrays of unequal length.
    """

    hook_point: HookPoint
    documents: int
    tokens: int
    sample: str
    norm_median: float
    norm_quantiles: dict[float, float]
    feature_max: Float[np.ndarray, " d_sae"] | None = None
    firing_rate: Float[np.ndarray, " d_sae"] | None = None

    def __post_init__(self) -> None:
        if self.documents < 1 or self.tokens < 1:
            raise InputError(f"statistics of {self.documents} documents and {self.tokens} tokens say nothing")
        for norm in (self.norm_median, *self.norm_quantiles.values()):
            if not (math.isfinite(norm) and norm >= 0):
                raise InputError(f"a residual norm of {norm} at {self.hook_point} is not a size")
        lengths = {len(array) for array in (self.feature_max, self.firing_rate) if array is not None}
        if len(lengths) > 1:
            raise InputError(f"feature_max and firing_rate differ in length: {sorted(lengths)}")

    def to_json(self) -> dict[str, Any]:
        """Plain values that `json.dumps` takes and `from_json` turns back into the same statistics, to the bit."""
        return {
            "hook_point": str(self.hook_point),
            "documents": self.documents,
            "tokens": self.tokens,
            "sample": self.sample,
            "norm_median": self.norm_median,
            "norm_quantiles": [[share, norm] for share, norm in sorted(self.norm_quantiles.items())],
            "feature_max": None if self.feature_max is None else self.feature_max.tolist(),
            "firing_rate": None if self.firing_rate is None else self.firing_rate.tolist(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerStats:
        """The statistics that `to_json` wrote.

        Raises:
            FormatError: a key is missing, unknown or of the wrong type.
        """
        fields = set(cls.__dataclass_fields__)
        if not isinstance(data, dict) or set(data) != fields:
            raise FormatError(f"layer statistics have exactly the keys {', '.join(sorted(fields))}")
        try:
            return cls(
                hook_point=HookPoint.parse(data["hook_point"]),
                documents=int(data["documents"]),
                tokens=int(data["tokens"]),
                sample=str(data["sample"]),
                norm_median=float(data["norm_median"]),
                norm_quantiles={float(share): float(norm) for share, norm in data["norm_quantiles"]},
                feature_max=_array(data["feature_max"]),
                firing_rate=_array(data["firing_rate"]),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"layer statistics hold a value that does not fit: {error}") from error


def residual_norms(
    model: nn.Module,
    batches: Iterable[Batch],
    hook_points: Iterable[HookPoint],
    *,
    sample: str,
    counted: Counted | None = None,
) -> dict[HookPoint, LayerStats]:
    """Median and quantiles of the residual norm at every hook point, over the tokens of the batches that count.

    Args:
        batches: pairs of token ids and attention mask, `(batch, seq)` each; a mask of None means no padding.
        sample: what the batches are, in words; it is kept with the figures.
        counted: which tokens count; by default all.

    Raises:
        InputError: no batch, no token that counts, or whatever `capture` refuses.
        NotFoundError: a hook point names a layer the model does not have.
        FormatError: a residual is not finite.
    """
    points = list(dict.fromkeys(hook_points))
    read = ((ids, mask, capture(model, ids, points, mask)) for ids, mask in batches)
    return norms_of(read, points, sample=sample, counted=counted)


def norms_of(
    read: Iterable[Read], points: Sequence[HookPoint], *, sample: str, counted: Counted | None = None
) -> dict[HookPoint, LayerStats]:
    """The same of residuals that have been read already.

    Args:
        read: of each batch the token ids and the mask, `(batch, seq)` each or None, and the residuals by hook point.

    Raises:
        InputError, FormatError: as `residual_norms`.
    """
    which = counted or Counted.everything()
    norms: dict[HookPoint, list[np.ndarray]] = {point: [] for point in points}
    documents = 0
    for input_ids, attention_mask, found in read:
        documents += len(input_ids)
        for point in points:
            h = found[point]
            size = torch.linalg.vector_norm(h.float(), dim=-1).cpu()
            real = torch.ones_like(size, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
            if not bool(size[real].isfinite().all()):
                raise FormatError(f"a residual at {point} is not finite; load the model in bfloat16 or float32")
            keep = which.keep(h, point, input_ids, mask=attention_mask).cpu()
            norms[point].append(size[keep].numpy())
    if not documents:
        raise InputError("there is no batch to measure residual norms on")
    for point in points:
        if not sum(map(len, norms[point])):
            raise InputError(f"no token of {sample} counts at {point}; give a longer sample, or count every token")
    return {point: _summarise(point, np.concatenate(norms[point]), documents, sample) for point in points}


def _summarise(point: HookPoint, norms: np.ndarray, documents: int, sample: str) -> LayerStats:
    quantiles = np.quantile(norms.astype(np.float64), QUANTILES)
    return LayerStats(
        hook_point=point,
        documents=documents,
        tokens=len(norms),
        sample=sample,
        norm_median=float(quantiles[QUANTILES.index(0.5)]),
        norm_quantiles={share: float(norm) for share, norm in zip(QUANTILES, quantiles, strict=True)},
    )


def _array(values: list[float] | None) -> np.ndarray | None:
    return None if values is None else np.asarray(values, dtype=np.float32)

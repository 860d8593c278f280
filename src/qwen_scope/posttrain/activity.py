"""What the features of a model do on fixed texts: firing rates, means, and how far those have moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from qwen_scope.model import HookPoint, capture
from qwen_scope.sae import SAE
from qwen_scope.text import Tokens, by_length

BATCH_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Activity:
    """What the features of a layer do on the probe texts; every array has one number per feature.

    Attributes:
        rate: the share of tokens on which it fires.
        mean: its mean activation over all tokens.
        spread: the standard deviation over texts of its mean activation on a text.
    """

    rate: Float64[np.ndarray, " d_sae"]
    mean: Float64[np.ndarray, " d_sae"]
    spread: Float64[np.ndarray, " d_sae"]

    def effect(self, now: Activity) -> Float64[np.ndarray, " d_sae"]:
        """How far each mean has moved: in its spread over texts at the start, or the median spread if that is larger.

        The median is of the features that fired at the start; so a feature that was silent then, or hardly varied, does
        not move far by moving at all.
        """
        fired = self.spread[self.rate > 0]
        floor = float(np.median(fired)) if len(fired) else 1.0
        return (now.mean - self.mean) / np.maximum(self.spread, floor if floor > 0 else 1.0)

    def drift(self, now: Activity) -> float:
        """One less the cosine between the mean activations then and now: 0 for no change of direction, at most 1."""
        lengths = float(np.linalg.norm(self.mean) * np.linalg.norm(now.mean))
        return max(0.0, 1.0 - float(self.mean @ now.mean) / lengths) if lengths else float(self.mean.any())


def activity_of(model: Any, saes: Mapping[int, SAE], tokens: Tokens) -> dict[int, Activity]:
    """By layer what the features do on these texts; the model's mode is left as it was."""
    points = [HookPoint.read_by(sae.hook_point, layer) for layer, sae in saes.items()]
    totals = {layer: [np.zeros(sae.d_sae) for _ in range(4)] for layer, sae in saes.items()}
    with evaluating(model):
        for rows in by_length(tokens.lengths, BATCH_TOKENS):
            seq = max(tokens.lengths[i] for i in rows)
            ids, mask = tokens.input_ids[rows, :seq], tokens.attention_mask[rows, :seq]
            for point, h in capture(model, ids, points, mask).items():
                add_batch(totals[point.layer], saes[point.layer], h, mask)
    n, texts = sum(tokens.lengths), len(tokens)
    out = {}
    for layer, (fires, total, means, squares) in totals.items():
        variance = np.maximum(0.0, squares / texts - (means / texts) ** 2)
        out[layer] = Activity(fires / n, total / n, np.sqrt(variance))
    return out


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A model that is being trained, without dropout for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def add_batch(totals: Sequence[np.ndarray], sae: SAE, h: torch.Tensor, mask: torch.Tensor) -> None:
    """Add a batch to firings, activations, and sums and squares of the means of texts."""
    here = mask.bool()
    acts = sae.encode(h[here.to(h.device)]).to("cpu")
    on = acts.values > 0
    text = torch.arange(len(mask))[:, None].expand_as(mask)[here][:, None].expand_as(on)[on]
    place = (text * sae.d_sae + acts.indices[on].long()).numpy()
    table = np.bincount(place, acts.values[on].double().numpy(), len(mask) * sae.d_sae).reshape(len(mask), -1)
    means = table / mask.sum(1, keepdim=True).numpy()
    totals[0][:] += np.bincount(acts.indices[on].numpy(), minlength=sae.d_sae)
    totals[1][:] += table.sum(0)
    totals[2][:] += means.sum(0)
    totals[3][:] += (means**2).sum(0)

"""The logits processors that choose and watch tokens inside `generate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen_scope.sae import in_float64

from .decoding import Decoding
from .finite import CheckFinite


@dataclass(eq=False)
class Watched:
    """What one batch chose, step by step, still on the model's device.

    Attributes:
        chosen: the token of every row, `(rows,)` per step.
        log_probability: its log-probability under the model, `(rows,)` per step.
        top: per step the `n` most probable tokens and their log-probabilities, `(rows, n)` each.
    """

    chosen: list[Tensor] = field(default_factory=list)
    log_probability: list[Tensor] = field(default_factory=list)
    top: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Observe(LogitsProcessor):
    """Keeps the raw scores for `Choose`; stands before anything that changes them."""

    scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores = scores.clone()  # repetition penalty writes into the tensor it is given
        return scores


class Choose(LogitsProcessor):
    """Stands last: draws a token, and leaves it as the only one that a greedy choice can take."""

    def __init__(
        self,
        uniforms: np.ndarray | None,
        observe: Observe | None,
        candidates: int,
        on_step: Sequence[Callable[[Tensor], None]],
    ) -> None:
        self.uniforms, self.observe, self.candidates, self.on_step = uniforms, observe, candidates, on_step
        self.seen = Watched()
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.uniforms is None:
            chosen = scores.argmax(-1)
        else:
            chosen = draw(scores, self.uniforms[:, min(self.step, self.uniforms.shape[1] - 1)])
            scores = torch.full_like(scores, -math.inf).scatter(-1, chosen[:, None], 0.0)
        self.step += 1
        self.seen.chosen.append(chosen)
        if self.observe is not None:
            raw = self.observe.scores
            assert raw is not None
            total = raw.logsumexp(-1, keepdim=True)
            self.seen.log_probability.append((raw.gather(-1, chosen[:, None]) - total)[:, 0])
            if self.candidates:
                best = raw.topk(min(self.candidates, raw.shape[-1]), dim=-1)
                self.seen.top.append((best.indices, best.values - total))
        for told in self.on_step:
            told(chosen)
        return scores


def draw(scores: Tensor, uniform: np.ndarray) -> Tensor:
    """One token per row from `softmax(scores)` by inverting its distribution function at `uniform`, `(rows,)`."""
    cumulative = in_float64(scores).softmax(-1).cumsum(-1)
    at = torch.as_tensor(uniform, dtype=torch.float64, device=cumulative.device)[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, at, right=True)[:, 0].clamp(max=scores.shape[-1] - 1)
    return chosen.to(scores.device)


def processors(
    decoding: Decoding,
    rows: Sequence[int],
    *,
    candidates: int | None,
    on_step: Sequence[Callable[[Tensor], None]] = (),
) -> tuple[LogitsProcessorList, Choose]:
    """The chain for one batch of a filled `Decoding`, and its last link, which holds what was seen.

    Args:
        rows: the place of each row in the whole list of prompts.
        candidates: how many of the most probable tokens to keep; None keeps no probabilities at all.
        on_step: called with the chosen token of every row, `(rows,)`, after each step.
    """
    chain: list[Any] = [CheckFinite()]
    observe = Observe() if candidates is not None else None
    if observe is not None:
        chain.append(observe)
    if decoding.repetition_penalty not in (None, 1.0):
        chain.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty or 1.0)))
    uniforms = None
    if decoding.sample:
        uniforms = np.stack([np.random.default_rng([decoding.seed, i]).random(decoding.max_new_tokens) for i in rows])
        if decoding.temperature not in (None, 1.0):
            chain.append(TemperatureLogitsWarper(float(decoding.temperature or 1.0)))
        if decoding.top_k:
            chain.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p not in (None, 1.0):
            chain.append(TopPLogitsWarper(float(decoding.top_p or 1.0)))
    choose = Choose(uniforms, observe, candidates or 0, on_step)
    return LogitsProcessorList([*chain, choose]), choose

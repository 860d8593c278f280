"""What a model under training writes of its own accord, read by the features of concepts.

On a text that is given, a feature shows what the model makes of that text. Whether the model has begun to *write*
something shows on its own answers: they are sampled anew at every measurement, and the share of them that hold more of
a concept than nearly all answers did at the start is compared with that share then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError, check_count
from qwen_scope.model import HookPoint, capture
from qwen_scope.sae import SAE
from qwen_scope.steer import Decoding, generate
from qwen_scope.text import by_length, padded, tokenize

from .activity import BATCH_TOKENS, evaluating

Features = Mapping[str, Mapping[int, Sequence[int]]]
"""Per concept, by layer, its features."""

ORDINARY = 0.98
"""So large a part of the answers at the start counts as ordinary."""


@dataclass(frozen=True)
class ProbePrompts:
    """Prompts that a watched model answers again and again.

    Attributes:
        prompts: as the model reads them, up to where the answer begins; at least two.
        max_new_tokens: where an answer is cut off.
        temperature, top_p: of the draws; by default those by which code-switching is measured.
        at_start: answers per prompt at step 0, which everything later is compared with; later it is one.
        seed: of the draws.

    Raises:
        InputError: fewer than two prompts, no answer at the start, or a number that can't be.
    """

    prompts: Sequence[str]
    max_new_tokens: int = 40
    temperature: float = 1.0
    top_p: float = 0.8
    at_start: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.prompts) < 2:
            raise InputError(f"a share of answers needs at least two prompts, not {len(self.prompts)}")
        check_count("at_start", self.at_start)
        check_count("seed", self.seed, 0)
        self.decoding(0)

    def decoding(self, turn: int) -> Decoding:
        """The draws of one answer per prompt."""
        return Decoding(self.max_new_tokens, True, self.temperature, self.top_p, 0, 1.0, seed=self.seed + turn)


def written(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    saes: Mapping[int, SAE],
    features: Features,
    probe_prompts: ProbePrompts,
    turns: Sequence[int],
) -> dict[str, Float64[np.ndarray, " answers"]]:
    """Per concept how much of it each answer holds: the mean over its features and the answer's tokens.

    Activations count in the mean of all that are active in their layer, so that layers weigh alike. An answer without a
    token holds nothing.

    Args:
        turns: one answer per prompt for each of these numbers, by which the draws differ.
    """
    prompts = tokenize(tokenizer, probe_prompts.prompts, max_length=None)
    starts = [prompts.input_ids[i, prompts.attention_mask[i].bool()].tolist() for i in range(len(prompts))]
    policy: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    rows, begins = [], []
    with evaluating(model):
        for turn in turns:
            found = generate(policy, tokenizer, probe_prompts.prompts, decoding=probe_prompts.decoding(turn))
            rows += [start + [one.token_id for one in f.tokens] for start, f in zip(starts, found, strict=True)]
            begins += [len(start) for start in starts]
        return read(model, saes, features, rows, begins)


def read(
    model: Any, saes: Mapping[int, SAE], features: Features, rows: Sequence[Sequence[int]], begins: Sequence[int]
) -> dict[str, Float64[np.ndarray, " answers"]]:
    """The same of answers that are there: token ids of prompts with answers, and where the answers begin."""
    total = {name: np.zeros(len(rows)) for name in features}
    active = {layer: np.zeros(2) for layer in saes}
    sums = {(name, layer): np.zeros(len(rows)) for name, some in features.items() for layer in some}
    lengths = [len(row) for row in rows]
    points = [HookPoint.read_by(sae.hook_point, layer) for layer, sae in saes.items()]
    for batch in by_length(lengths, BATCH_TOKENS):
        ids, mask = padded([rows[i] for i in batch])
        own = mask.bool()
        for at, i in enumerate(batch):
            own[at, : begins[i]] = False
        answer = own.nonzero()[:, 0].numpy()
        for point, h in capture(model, ids, points, mask).items():
            layer = point.layer
            acts = saes[layer].encode(h[own.to(h.device)])
            active[layer] += float(acts.values.sum()), float((acts.values > 0).sum())
            for name, some in features.items():
                if layer in some:
                    each = acts.select(list(some[layer])).double().mean(-1).cpu().numpy()
                    sums[name, layer][batch] += np.bincount(answer, each, len(batch))
    tokens = np.maximum(1, np.array(lengths) - np.array(begins))
    for (name, layer), values in sums.items():
        amount, n = active[layer]
        weight = sum(map(len, features[name].values()))
        total[name] += values / tokens / max(amount / max(n, 1), 1e-12) * len(features[name][layer]) / weight
    return total


def rise_in_generation(start: Float64[np.ndarray, " before"], now: Float64[np.ndarray, " after"]) -> float:
    """By how many standard errors more answers than at the start hold more than an ordinary one did then.

    Ordinary is what `ORDINARY` of the answers at the start hold at most. The two shares of answers beyond that are
    compared as two binomial proportions with one rate.
    """
    bar = float(np.quantile(start, ORDINARY))
    beyond = np.array([np.sum(start > bar), np.sum(now > bar)])
    n = np.array([len(start), len(now)])
    rate = beyond.sum() / n.sum()
    error = np.sqrt(rate * (1 - rate) * np.sum(1 / n))
    before, after = beyond / n
    return float((after - before) / error) if error > 0 else 0.0

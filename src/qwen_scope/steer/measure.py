"""What a text and a change of the stream cost: perplexity, repetition, and KL to the unsteered model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from qwen_scope.errors import InputError, check_count
from qwen_scope.model import input_device, positions_from_mask
from qwen_scope.text import padded

from .finite import explained
from .generate import Generation
from .intervention import Intervention
from .phases import TEXT, PromptPhases, RowPhases
from .steering import SAEsByLayer, StatsByLayer, steering

# Logits held at once.
LOGIT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Row:
    """Token ids to score: the prompt is read, what follows is scored.

    Attributes:
        ids: the whole sequence.
        start: the first token that counts; at least 1. In steering, the prompt ends before it.
        phases: the phase of every token, an index into `PHASES`; None: a plain text, whose tokens are all `text`.
    """

    ids: tuple[int, ...]
    start: int = 1
    phases: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.start <= len(self.ids):
            raise InputError(f"scoring starts at token 1 to {len(self.ids)} of {len(self.ids)}, not at {self.start}")


def rows_of(
    prompt_ids: Sequence[Sequence[int]], generations: Sequence[Generation], phases: PromptPhases | None = None
) -> list[Row]:
    """The generations as rows whose continuation counts.

    Args:
        phases: of these prompts, where interventions at phases will run on the rows.
    """
    out = []
    for i, (ids, one) in enumerate(zip(prompt_ids, generations, strict=True)):
        made = [token.token_id for token in one.tokens]
        out.append(Row((*ids, *made), len(ids), None if phases is None else phases.followed(i, made)))
    return out


def log_probabilities(
    model: PreTrainedModel,
    rows: Sequence[Row],
    interventions: Sequence[Intervention] = (),
    saes: SAEsByLayer | None = None,
    stats: StatsByLayer | None = None,
) -> list[Float[np.ndarray, " _"]]:
    """Per row, the log-probability in nats of every token that counts, under the interventions; none if none counts."""
    out: list[np.ndarray] = [np.zeros(0)] * len(rows)
    for some, ids, mask in _padded(model, rows):
        logits = _logits(model, rows, some, ids, mask, interventions, saes, stats)
        chosen = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None].to(logits.device))[..., 0].cpu().numpy()
        for i, row in enumerate(some):
            out[row] = chosen[i, rows[row].start - 1 : len(rows[row].ids) - 1].astype(np.float64)
    return out


def next_token_kl(
    model: PreTrainedModel,
    rows: Sequence[Row],
    interventions: Sequence[Intervention],
    saes: SAEsByLayer | None = None,
    stats: StatsByLayer | None = None,
) -> list[Float[np.ndarray, " _"]]:
    """Per row, KL(unsteered || steered) in nats of the distribution of every token that counts, on the same text."""
    out: list[np.ndarray] = [np.zeros(0)] * len(rows)
    for some, ids, mask in _padded(model, rows):
        plain = _logits(model, rows, some, ids, mask, (), None, None)[:, :-1].log_softmax(-1)
        changed = _logits(model, rows, some, ids, mask, interventions, saes, stats)[:, :-1].log_softmax(-1)
        kl = (plain.exp() * (plain - changed)).sum(-1).clamp(min=0).cpu().numpy()
        for i, row in enumerate(some):
            out[row] = kl[i, rows[row].start - 1 : len(rows[row].ids) - 1].astype(np.float64)
    return out


def perplexity(log_probability: Sequence[Float[np.ndarray, " _"]]) -> float:
    """`exp` of the mean negative log-probability over all tokens of all rows; NaN where there is no token."""
    total = np.concatenate([np.zeros(0), *log_probability])
    return float(np.exp(-total.mean())) if len(total) else float("nan")


def repetition(ids: Sequence[int], n: int = 3) -> float:
    """The share of n-grams of a sequence that occurred before in it; 0 for a sequence shorter than n + 1."""
    check_count("n", n)
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def _padded(model: PreTrainedModel, rows: Sequence[Row]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Rows of like length as ids and mask, padded on the right, few enough for their logits to fit."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    while order:
        some = [order.pop(0)]
        while order and (len(some) + 1) * len(rows[order[0]].ids) * vocab * 4 <= LOGIT_BYTES:
            some.append(order.pop(0))
        yield some, *padded([rows[i].ids for i in some])


@torch.no_grad()
def _logits(
    model: PreTrainedModel,
    rows: Sequence[Row],
    some: list[int],
    ids: Tensor,
    mask: Tensor,
    interventions: Sequence[Intervention],
    saes: SAEsByLayer | None,
    stats: StatsByLayer | None,
) -> Tensor:
    place = input_device(model)
    phases = RowPhases([rows[i].phases or [TEXT] * len(rows[i].ids) for i in some])
    lengths = [rows[i].start for i in some]
    with steering(model, interventions, saes, stats, prompt_lengths=lengths, phases=phases):
        out = model(
            input_ids=ids.to(place),
            attention_mask=mask.to(place),
            position_ids=positions_from_mask(mask).to(place),
            use_cache=False,
        )
    logits = out.logits.float()
    bad = (~logits.amax(-1).isfinite() & mask.bool().to(logits.device)).any(-1)
    if bad.any():
        i = int(bad.nonzero()[0])
        row = rows[some[i]]
        raise explained(model, row.ids, interventions, saes, stats, prompt_length=row.start, phases=phases.row(i))
    return logits

"""Answers of one model to some prompts in many cases at once, which a vector added to the stream tells apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qwen_scope import Scope
from qwen_scope.features.wording import language_of
from qwen_scope.model import HookPoint, changing
from qwen_scope.steer import Decoding, generate, log_probabilities, repetition, rows_of
from qwen_scope.steer.generate import batches

TOGETHER = 10**6

Case = tuple[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Made:
    """Answers to some prompts: their languages, log-probabilities behind the plain prompt, and repeated 3-grams."""

    said: list[str]
    scored: list[np.ndarray]
    repeated: np.ndarray
    example: str

    def share(self, language: str) -> float:
        """Of the answers in the language, by the detector's name of it."""
        return float(np.mean([said == language for said in self.said]))


def answered(
    scope: Scope, prompts: Sequence[str], cases: Sequence[Case], point: HookPoint, new: int, scored: int | None = None
) -> list[Made]:
    """Continue the prompts by `new` tokens in every case, in one batch; answers of the first `scored` cases are scored.

    A case is what stands before the prompts and a vector that is added to every token at the hook point.
    """
    chat = "default" if scope.tokenizer.chat_template else None
    asked = [f"{before}{prompt}" for before, _ in cases for prompt in prompts]
    (rows,) = batches(scope.tokenize(asked, chat=chat).lengths, new, TOGETHER)
    added = torch.stack([cases[row // len(prompts)][1] for row in rows])[:, None]
    with changing(scope.model, {point: lambda h, _: h + added.to(h.dtype)}):
        made = generate(
            scope.model,
            scope.tokenizer,
            asked,
            decoding=Decoding(max_new_tokens=new),
            chat=chat,
            batch_tokens=TOGETHER,
        )
    tokens = scope.tokenize(list(prompts), chat=chat)
    ids = [row[:n].tolist() for row, n in zip(tokens.input_ids, tokens.lengths, strict=True)]
    out = []
    for i in range(len(cases)):
        some = made[i * len(prompts) : (i + 1) * len(prompts)]
        score = scored is None or i < scored
        repeated = np.array([repetition([token.token_id for token in one.tokens]) for one in some])
        costs = log_probabilities(scope.model, rows_of(ids, some)) if score else []
        out.append(Made([language_of(one.text) for one in some], costs, repeated, some[0].text))
    return out

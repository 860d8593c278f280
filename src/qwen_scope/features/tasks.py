"""Tasks that steering must not break: questions with one right answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from qwen_scope.errors import InputError
from qwen_scope.scope import Scope
from qwen_scope.steer import Decoding, Intervention, SAEsByLayer, generate

from .validate import Task


def answer_task(
    scope: Scope,
    pairs: Sequence[tuple[str, str]],
    *,
    chat: str | None = None,
    max_new_tokens: int = 40,
    saes: SAEsByLayer | None = None,
) -> Task:
    """Accuracy on questions: 1 where the greedy continuation holds the answer as a whole word, else 0.

    Args:
        pairs: prompts and answers.
        chat: wrap each prompt as a user's message.

    Raises:
        InputError: fewer than two questions, or an empty answer.
    """
    if len(pairs) < 2 or not all(answer.strip() for _, answer in pairs):
        raise InputError("a task has at least two questions, each with an answer that is not empty")
    prompts = [prompt for prompt, _ in pairs]
    patterns = [re.compile(rf"(?<!\w){re.escape(answer.strip())}(?!\w)") for _, answer in pairs]
    decoding = Decoding(max_new_tokens=max_new_tokens)

    def right(interventions: list[Intervention]) -> np.ndarray:
        tools = {"saes": saes or scope.saes, "stats": scope.stats, "decoding": decoding, "chat": chat}
        made = generate(scope.model, scope.tokenizer, prompts, interventions, **tools)
        pairs = zip(patterns, made, strict=True)
        return np.array([float(pattern.search(one.text) is not None) for pattern, one in pairs])

    return right

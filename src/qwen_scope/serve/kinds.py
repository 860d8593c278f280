"""The phases of one request's tokens while it grows: the prompt's as they were found, the others followed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from qwen_scope.text import GenerationPhases

from .protocol import PromptKinds

TokensOf = Callable[[int, int], Sequence[int]]
"""The ids of a request's tokens from the first position given to before the second."""


class Kinds:
    """Phases by position; every token is followed once, in order, however often and in what chunks it is computed."""

    def __init__(self, given: PromptKinds, tokenizer: PreTrainedTokenizerBase) -> None:
        prompt = given.tokens
        self._known = np.zeros(max(64, 2 * len(prompt)), np.int8)
        self._known[: len(prompt)] = prompt
        self._count = len(prompt)
        self._following = GenerationPhases(tokenizer, given.chat, given.first)  # pyright: ignore[reportArgumentType]

    def between(self, first: int, end: int, tokens: TokensOf) -> Int[np.ndarray, " n"]:
        """The phases of the tokens at positions `first` to before `end`.

        Args:
            tokens: gives the ids of those that were not followed yet.
        """
        if end > self._count:
            ids = tokens(self._count, end)
            if end > len(self._known):
                self._known = np.concatenate([self._known, np.zeros(2 * end - len(self._known), np.int8)])
            self._known[self._count : end] = self._following.follow(ids)
            self._count = end
        return self._known[first:end]

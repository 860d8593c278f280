"""How answers are sampled, and what counts as a loop in them; light enough for `--help`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qwen_scope.errors import InputError, check_count

if TYPE_CHECKING:
    from qwen_scope.steer import Decoding


@dataclass(frozen=True)
class Detector:
    """What counts as a loop, in tokens.

    Attributes:
        longest: the longest block looked for.
        times: how often a block stands in a row at least.
        least: how long the periodic end is at least.

    Raises:
        InputError: a block of no token, fewer than two times, or no length.
    """

    longest: int = 64
    times: int = 4
    least: int = 16

    def __post_init__(self) -> None:
        if self.longest < 1 or self.times < 2 or self.least < 1:
            raise InputError(
                "a loop is a block of at least 1 token, at least 2 times in a row, at least 1 token long; got"
                f" longest={self.longest}, times={self.times}, least={self.least}"
            )
        for name, least in {"longest": 1, "times": 2, "least": 1}.items():
            check_count(f"{name} of a loop", getattr(self, name), least)

    def find(self, ids: Sequence[int]) -> Loop | None:
        """The loop that these tokens end in; whether the model ended the answer is the caller's to ask."""
        import numpy as np

        tokens = np.asarray(ids)
        for n in range(1, min(self.longest, len(tokens) // self.times) + 1):
            differs = np.flatnonzero(tokens[n:] != tokens[:-n])
            start = int(differs[-1]) + 1 if len(differs) else 0
            if len(tokens) - start >= max(self.times * n, self.least):
                return Loop(start, n, (len(tokens) - start) / n)
        return None


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled, and what counts as a loop in them.

    Attributes:
        max_new_tokens, temperature, top_p: as in transformers; nothing else changes the distribution.
        seed: of the draws; a prompt draws alike with and without interventions.

    Raises:
        InputError: a limit below what a loop needs, or a number that can't be.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    detector: Detector = field(default_factory=Detector)
    seed: int = 0

    def __post_init__(self) -> None:
        self.decoding(self.seed)
        if self.max_new_tokens < self.detector.least:
            raise InputError(f"{self.max_new_tokens} new tokens can't hold a loop of {self.detector.least}; allow more")

    def decoding(self, seed: int) -> Decoding:
        """One draw."""
        from qwen_scope.steer import Decoding

        return Decoding(self.max_new_tokens, True, self.temperature, self.top_p, 0, 1.0, seed)


@dataclass(frozen=True)
class Loop:
    """The periodic end of an answer.

    Attributes:
        start: its first token.   period: tokens of the block.   turns: how often the block stands there.
    """

    start: int
    period: int
    turns: float

"""Endless repetition: when an answer counts as looping, and how often a model's answers do.

An answer loops if all three hold:

1. it ran into the limit of new tokens: the model never ended it;
2. from some token on to its last token it is periodic: token `i` equals token `i - n` for one `n` of 1 to `longest`;
   the periodic end holds the block of `n` tokens at least `times` times (the last of them may be cut off after any
   token, and then counts as the part that is there);
3. that periodic end is at least `least` tokens long, so that a row of dots is no loop.

Of several `n` the smallest counts. The report that this follows (arXiv 2605.11887, section 8) does not say how it
detects loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwen_scope.errors import InputError, check_count
from qwen_scope.stats import Interval, bootstrap
from qwen_scope.steer import Decoding, Intervention, SAEsByLayer, generate


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


@dataclass(frozen=True)
class Answer:
    """One sampled answer: its prompt's number, text and tokens, whether the model ended it, and its loop."""

    prompt: int
    text: str
    ids: tuple[int, ...]
    finished: bool
    loop: Loop | None


@dataclass(frozen=True)
class LoopShare:
    """What was measured.

    Attributes:
        share: of answers that loop, with an interval over prompts.
        finished: share of answers that the model ended.
        answers: one per prompt and sample, samples of a prompt together.
    """

    share: Interval
    finished: float
    answers: list[Answer]

    def per_prompt(self) -> np.ndarray:
        """The looping share of every prompt."""
        count = max(one.prompt for one in self.answers) + 1
        return np.array([one.loop is not None for one in self.answers], float).reshape(count, -1).mean(1)


def loop_share(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    samples: int = 1,
    interventions: Sequence[Intervention] = (),
    saes: SAEsByLayer | None = None,
    report: Callable[[float], None] | None = None,
) -> LoopShare:
    """The share of sampled answers that loop, by the definition at the head of this file.

    Args:
        prompts: as the model reads them, up to where the answer begins.
        samples: answers per prompt.
        interventions, saes: the model is steered so while it answers.

    Raises:
        InputError: fewer than two prompts, no sample, or what `generate` refuses.
    """
    sampling = sampling or Sampling()
    if len(prompts) < 2:
        raise InputError(f"a share needs at least two prompts, not {len(prompts)}")
    check_count("samples", samples)
    rows: list[list[Answer]] = [[] for _ in prompts]
    for turn in range(samples):
        mine = sampling.decoding(sampling.seed * samples + turn)
        for i, found in enumerate(generate(model, tokenizer, prompts, interventions, saes=saes, decoding=mine)):
            ids = tuple(token.token_id for token in found.tokens)
            loop = None if found.finished else sampling.detector.find(ids)
            rows[i].append(Answer(i, found.text, ids, found.finished, loop))
        if report is not None:
            report((turn + 1) / samples)
    answers = [one for row in rows for one in row]
    looping = np.array([[one.loop is not None for one in row] for row in rows], float).mean(1)
    return LoopShare(bootstrap(looping, seed=sampling.seed), float(np.mean([one.finished for one in answers])), answers)

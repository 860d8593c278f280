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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwen_scope.errors import InputError, check_count
from qwen_scope.report import HasFrames, Progress, Table
from qwen_scope.stats import Interval, bootstrap
from qwen_scope.steer import Intervention, SAEsByLayer, generate

from .sampling import Loop, Sampling


@dataclass(frozen=True)
class Answer:
    """One sampled answer: its prompt's number, text and tokens, whether the model ended it, and its loop."""

    prompt: int
    text: str
    ids: tuple[int, ...]
    finished: bool
    loop: Loop | None


@dataclass(frozen=True, repr=False)
class LoopShare(HasFrames):
    """What was measured.

    Attributes:
        share: of answers that loop, with an interval over prompts.
        finished: share of answers that the model ended.
        answers: one per prompt and sample, samples of a prompt together.
    """

    share: Interval
    finished: float
    answers: list[Answer]

    def sheet(self) -> Table:
        """A row per answer."""
        rows = [(one.prompt, one.text, len(one.ids), one.finished, one.loop is not None) for one in self.answers]
        return Table(
            f"{self.share.estimate:.0%} of answers loop", ("prompt", "text", "tokens", "finished", "loops"), rows
        )

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
    progress: Progress | None = None,
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
        if progress is not None:
            progress("sampling", (turn + 1) / samples, f"{turn + 1} of {samples}")
    answers = [one for row in rows for one in row]
    looping = np.array([[one.loop is not None for one in row] for row in rows], float).mean(1)
    return LoopShare(bootstrap(looping, seed=sampling.seed), float(np.mean([one.finished for one in answers])), answers)

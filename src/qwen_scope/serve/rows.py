"""Which interventions apply to each token of a step: numpy alone, no torch and no vLLM.

`steer.Where.mask` is the definition. A server asks the same of tokens that come in chunks, whose requests are preempted
and prefilled again with what they had generated, so a token is told by its position, the length of its request's prompt
and its phase, never by the kind of step that computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from jaxtyping import Bool, Int

from qwen_scope.steer import Where
from qwen_scope.text import PHASES

MOST_WHERES = 62
"""Bits of a code."""


def places(
    where: Where, positions: Int[np.ndarray, " n"], prompt: int, phases: Int[np.ndarray, " n"] | None = None
) -> Bool[np.ndarray, " n"]:
    """Which of one request's tokens belong to `where`.

    Args:
        positions: of the tokens.
        prompt: tokens of the request's prompt; a token from there on is generated.
        phases: of the tokens, indices into `PHASES`; only read where `where` names phases.
    """
    before = positions < prompt
    chosen = np.zeros(len(positions), bool)
    if where.prompt:
        chosen |= before
    if where.generated:
        chosen |= ~before
    for first, last in where.spans:
        chosen |= (positions >= first) & (positions <= last)
    for half, named in ((before, where.prompt_phases), (~before, where.generated_phases)):
        for phase in named:
            assert phases is not None, "admission sees to it that the phases are known"
            chosen |= half & (phases == PHASES.index(phase))
    return chosen


@dataclass(frozen=True)
class Pattern:
    """Several `Where` at once: a token's code has bit i set where the i-th holds.

    Attributes:
        wheres: at most `MOST_WHERES`, none twice.
    """

    wheres: tuple[Where, ...]

    @classmethod
    def of(cls, wheres: Iterable[Where]) -> Pattern:
        """Each `Where` once, in order of first mention."""
        return cls(tuple(dict.fromkeys(wheres)))

    @cached_property
    def by_phase(self) -> bool:
        """Whether phases have to be known."""
        return any(where.by_phase for where in self.wheres)

    @cached_property
    def plain(self) -> bool:
        """Whether a token's code depends on nothing but whether it belongs to the prompt."""
        return not self.by_phase and not any(where.spans for where in self.wheres)

    @cached_property
    def reach(self) -> int:
        """The last listed position; -1 where none is listed."""
        return max((where.reach for where in self.wheres), default=-1)

    @cached_property
    def ends(self) -> tuple[int, int]:
        """The codes of a token of the prompt and of a generated one, listed positions and phases left out."""
        prompt = sum(1 << i for i, where in enumerate(self.wheres) if where.prompt)
        return prompt, sum(1 << i for i, where in enumerate(self.wheres) if where.generated)

    def codes(
        self, positions: Int[np.ndarray, " n"], prompt: int, phases: Int[np.ndarray, " n"] | None = None
    ) -> Int[np.ndarray, " n"]:
        """The code of each token; the arguments are those of `places`."""
        out = np.zeros(len(positions), np.int64)
        for bit, where in enumerate(self.wheres):
            out |= places(where, positions, prompt, phases).astype(np.int64) << bit
        return out

    def possible(self) -> set[int]:
        """Every code but 0 that a token may have, whatever its position, prompt and phase.

        Membership changes with position only at the ends of listed ranges, so one position of each stretch between
        them stands for all of it.
        """
        edges = {0} | {edge for where in self.wheres for first, last in where.spans for edge in (first, last + 1)}
        stretches = np.array(sorted(edges), np.int64)
        kinds = sorted({PHASES.index(p) for w in self.wheres for p in (*w.prompt_phases, *w.generated_phases)})
        others = [i for i in range(len(PHASES)) if i not in kinds][:1]  # one stands for all that are not named
        found: set[int] = set()
        for half, kind in product((0, 2**40), kinds + others if self.by_phase else [0]):
            phases = np.full(len(stretches), kind, np.int8)
            found |= set(self.codes(stretches, half, phases).tolist())
        return found - {0}


@dataclass(frozen=True)
class Step:
    """How a step's tokens lie: those of request i are `starts[i] : starts[i] + counts[i]`.

    Attributes:
        counts: tokens of each request in this step, at least one.
        computed: the position of the first of them.
        prompts: tokens of each request's prompt.
    """

    counts: Int[np.ndarray, " requests"]
    computed: Int[np.ndarray, " requests"]
    prompts: Int[np.ndarray, " requests"]

    @cached_property
    def starts(self) -> Int[np.ndarray, " requests"]:
        """Where the tokens of each request begin."""
        return np.cumsum(self.counts) - self.counts

    @property
    def tokens(self) -> int:
        """Of all requests."""
        return int(self.counts.sum())

    @cached_property
    def generated(self) -> Bool[np.ndarray, " requests"]:
        """Which requests have no token of their prompt in this step."""
        return self.computed >= self.prompts

    @cached_property
    def mixed(self) -> Bool[np.ndarray, " requests"]:
        """Which have tokens of their prompt and generated ones, as after a preemption."""
        return ~self.generated & (self.computed + self.counts > self.prompts)

    def positions(self, i: int) -> Int[np.ndarray, " n"]:
        """Of the tokens of request i."""
        first = int(self.computed[i])
        return np.arange(first, first + int(self.counts[i]))


Phases = Callable[[int, int], np.ndarray]
"""The phases of a request's tokens from the first position given to before the second."""


Codes = np.ndarray | int
"""One for each token of a request, or one for all of them."""


def step_codes(step: Step, patterns: Sequence[Pattern | None], phases: Sequence[Phases | None]) -> list[Codes]:
    """Per request the codes of its tokens: one number where all agree, 0 for a request without a pattern."""
    out: list[Codes] = []
    generated, mixed = step.generated.tolist(), step.mixed.tolist()
    for i, pattern in enumerate(patterns):
        if pattern is None:
            out.append(0)
        elif not mixed[i] and (pattern.plain or (not pattern.by_phase and int(step.computed[i]) > pattern.reach)):
            out.append(pattern.ends[generated[i]])
        else:
            positions = step.positions(i)
            tell = phases[i] if pattern.by_phase else None
            known = None if tell is None else tell(int(positions[0]), int(positions[-1]) + 1)
            out.append(pattern.codes(positions, int(step.prompts[i]), known))
    return out


def spread(step: Step, values: Sequence[Codes]) -> Int[np.ndarray, " tokens"]:
    """One number for each token of the step, from one number or an array for each request."""
    out = np.repeat(
        np.fromiter((0 if isinstance(v, np.ndarray) else v for v in values), np.int64, len(values)), step.counts
    )
    for i, value in enumerate(values):
        if isinstance(value, np.ndarray):
            start = int(step.starts[i])
            out[start : start + len(value)] = value
    return out

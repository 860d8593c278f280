"""`Where`: the tokens that an intervention touches."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from qwen_scope.errors import InputError, brief
from qwen_scope.text import PHASES, Phase

FITS = (
    "write all, prompt, generated, positions such as 0,2,5-8, a phase such as thinking or generated:answer, or several"
    " of these with commas between"
)
GENERABLE: tuple[Phase, ...] = ("text", "thinking", "answer", "tool_call")
"""The phases that a generated token can have; the others are what a prompt brings."""

_POSITIONS = re.compile(r"([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?")
_PHASE = re.compile(r"(?:(prompt|generated)\s*:\s*)?([a-z_]+)")


@dataclass(frozen=True)
class Where:
    """Which tokens of a sequence: the union of the prompt, what is generated, phases, and listed positions.

    Positions count from 0 within the sequence's own tokens: padding does not count, a chat template does. Phases are
    those of `qwen_scope.text`: `text` outside conversations, and inside them `system`, `user`, `thinking`, `answer`,
    `tool_call` and `tool_result`.

    `all` and `prompt` hold special tokens and sinks, such as the first token, too. A sink's residual may be a hundred
    times as long as others, so a vector added there changes its direction little; `scale`, `clamp`, `floor` and `cap`
    set a feature's activation there as anywhere else. To leave sinks alone, name positions or phases.

    Attributes:
        prompt: every token of the prompt.
        generated: every token after it.
        spans: listed positions as ranges `(first, last)`, both inclusive, sorted and disjoint.
        prompt_phases: tokens of the prompt of these phases.
        generated_phases: generated tokens of these phases.
    """

    prompt: bool = False
    generated: bool = False
    spans: tuple[tuple[int, int], ...] = ()
    prompt_phases: tuple[Phase, ...] = ()
    generated_phases: tuple[Phase, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Where:
        """What `FITS` lists: `all`, `prompt`, `generated`, positions such as `0,2,5-8`, a phase such as `thinking` (in
        the prompt and in what is generated), a phase of one of the two such as `generated:answer`, or several of these.

        Raises:
            InputError: anything else, an empty text, a range that runs backwards, or a phase that is never generated.
        """
        parts: set[str] = set()
        spans = []
        phases: dict[str, set[str]] = {"prompt": set(), "generated": set()}
        for part in map(str.strip, text.split(",")):
            if part in ("all", "prompt", "generated"):
                parts |= {"prompt", "generated"} if part == "all" else {part}
            elif match := _POSITIONS.fullmatch(part):
                first = int(match[1])
                last = first if match[2] is None else int(match[2])
                if last < first:
                    raise InputError(f"the range of positions {part!r} runs backwards; write {last}-{first}")
                spans.append((first, last))
            elif (match := _PHASE.fullmatch(part)) and match[2] in PHASES:
                if match[1] == "generated" and match[2] not in GENERABLE:
                    raise InputError(f"no generated token is of the phase {match[2]}; write {match[2]}")
                for half in [match[1]] if match[1] else ["prompt", "generated"]:
                    phases[half].add(match[2])
            else:
                raise InputError(f"{brief(part)} is not a position or a phase; {FITS}")
        return cls(
            "prompt" in parts,
            "generated" in parts,
            () if len(parts) == 2 else _merged(spans),
            () if "prompt" in parts else _ordered(phases["prompt"]),
            () if "generated" in parts else _ordered(phases["generated"] & set(GENERABLE)),
        )

    def __str__(self) -> str:
        """What `parse` reads back."""
        if self.everywhere:
            return "all"
        both = [
            phase
            for phase in self.prompt_phases
            if phase in self.generated_phases or phase not in GENERABLE or self.generated
        ]
        both += [phase for phase in self.generated_phases if self.prompt]
        parts = [
            *["prompt"] * self.prompt,
            *["generated"] * self.generated,
            *both,
            *(f"prompt:{phase}" for phase in self.prompt_phases if phase not in both),
            *(f"generated:{phase}" for phase in self.generated_phases if phase not in both),
            *(str(first) if first == last else f"{first}-{last}" for first, last in self.spans),
        ]
        return ",".join(parts)

    @property
    def everywhere(self) -> bool:
        """Whether no token is left out."""
        return self.prompt and self.generated

    @property
    def nowhere(self) -> bool:
        """Whether no token belongs here."""
        return not (self.prompt or self.generated or self.spans or self.by_phase)

    @property
    def by_phase(self) -> bool:
        """Whether the phases of tokens have to be known."""
        return bool(self.prompt_phases or self.generated_phases)

    @property
    def reach(self) -> int:
        """The largest listed position, -1 if none is listed."""
        return max((last for _, last in self.spans), default=-1)

    def overlaps(self, other: Where) -> bool:
        """Whether a token may belong to both; a listed position may be prompt or generated, and of any phase."""
        if self.spans and other.spans and any(a <= d and c <= b for a, b in self.spans for c, d in other.spans):
            return True
        if (self.spans and other.besides_spans) or (other.spans and self.besides_spans):
            return True
        halves = (
            (self.prompt, self.prompt_phases, other.prompt, other.prompt_phases),
            (self.generated, self.generated_phases, other.generated, other.generated_phases),
        )
        return any(
            bool(set(mine) & set(theirs)) or (all_mine and (all_theirs or theirs)) or (all_theirs and mine)
            for all_mine, mine, all_theirs, theirs in halves
        )

    @property
    def besides_spans(self) -> bool:
        """Whether anything but listed positions belongs here."""
        return self.prompt or self.generated or self.by_phase

    def mask(
        self,
        positions: Int[Tensor, "batch seq"],
        prompt_lengths: Int[Tensor, "batch one"],
        phases: Int[Tensor, "batch seq"] | None = None,
    ) -> Bool[Tensor, "batch seq"]:
        """Which of the tokens at `positions` belong here.

        Args:
            prompt_lengths: tokens of each row's prompt, `(batch, 1)`; a token from there on is generated.
            phases: the phase of each token, an index into `PHASES`.

        Raises:
            InputError: the phases have to be known and are not given.
        """
        prompt = positions < prompt_lengths
        chosen = torch.zeros_like(prompt)
        if self.prompt:
            chosen = chosen | prompt
        if self.generated:
            chosen = chosen | ~prompt
        for first, last in self.spans:
            chosen = chosen | ((positions >= first) & (positions <= last))
        if self.by_phase and phases is None:
            raise InputError(f"an intervention at {self} has to know the phases of the tokens; steer with `generate`")
        for half, named in ((prompt, self.prompt_phases), (~prompt, self.generated_phases)):
            for phase in named:
                chosen = chosen | (half & (phases == PHASES.index(phase)))
        return chosen


EVERYWHERE = Where(prompt=True, generated=True)


def _ordered(phases: set[str]) -> tuple[Phase, ...]:
    return tuple(cast(Phase, phase) for phase in PHASES if phase in phases)


def _merged(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted ranges without overlap; neighbours join."""
    out: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if out and first <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(last, out[-1][1]))
        else:
            out.append((first, last))
    return tuple(out)

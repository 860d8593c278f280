"""`Where`: the tokens that an intervention touches."""

from __future__ import annotations

import re
from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor

from qwen_scope.errors import InputError, brief

FITS = "write all, prompt, generated, positions such as 0,2,5-8, or several of these with commas between"
_POSITIONS = re.compile(r"([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?")


@dataclass(frozen=True)
class Where:
    """Which tokens of a sequence: the union of the prompt, what is generated, and listed positions.

    Positions count from 0 within the sequence's own tokens: padding does not count, a chat template does.

    Attributes:
        prompt: every token of the prompt.
        generated: every token after it.
        spans: listed positions as ranges `(first, last)`, both inclusive, sorted and disjoint.
    """

    prompt: bool = False
    generated: bool = False
    spans: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Where:
        """`all`, `prompt`, `generated`, positions such as `0,2,5-8`, or several of these with commas between.

        Raises:
            InputError: anything else, an empty text, or a range that runs backwards.
        """
        prompt = generated = False
        spans = []
        for part in map(str.strip, text.split(",")):
            match = _POSITIONS.fullmatch(part)
            if part in ("all", "prompt", "generated"):
                prompt |= part != "generated"
                generated |= part != "prompt"
            elif match:
                first = int(match[1])
                last = first if match[2] is None else int(match[2])
                if last < first:
                    raise InputError(f"the range of positions {part!r} runs backwards; write {last}-{first}")
                spans.append((first, last))
            else:
                raise InputError(f"{brief(part)} is not a position; {FITS}")
        return cls(prompt, generated, () if prompt and generated else _merged(spans))

    def __str__(self) -> str:
        """What `parse` reads back."""
        if self.everywhere:
            return "all"
        parts = [str(first) if first == last else f"{first}-{last}" for first, last in self.spans]
        return ",".join([*["prompt"] * self.prompt, *["generated"] * self.generated, *parts])

    @property
    def everywhere(self) -> bool:
        """Whether no token is left out."""
        return self.prompt and self.generated

    @property
    def reach(self) -> int:
        """The largest listed position, -1 if none is listed."""
        return max((last for _, last in self.spans), default=-1)

    def overlaps(self, other: Where) -> bool:
        """Whether a token may belong to both; a listed position may be prompt or generated."""
        if (self.prompt and other.prompt) or (self.generated and other.generated):
            return True
        if (self.spans and (other.prompt or other.generated)) or (other.spans and (self.prompt or self.generated)):
            return True
        return any(a <= d and c <= b for a, b in self.spans for c, d in other.spans)

    def mask(
        self, positions: Int[Tensor, "batch seq"], prompt_lengths: Int[Tensor, "batch one"]
    ) -> Bool[Tensor, "batch seq"]:
        """Which of the tokens at `positions` belong here.

        Args:
            prompt_lengths: tokens of each row's prompt, `(batch, 1)`; a token from there on is generated.
        """
        chosen = positions < 0
        if self.prompt:
            chosen = chosen | (positions < prompt_lengths)
        if self.generated:
            chosen = chosen | (positions >= prompt_lengths)
        for first, last in self.spans:
            chosen = chosen | ((positions >= first) & (positions <= last))
        return chosen


EVERYWHERE = Where(prompt=True, generated=True)


def _merged(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted ranges without overlap; neighbours join."""
    out: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if out and first <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(last, out[-1][1]))
        else:
            out.append((first, last))
    return tuple(out)

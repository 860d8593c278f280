"""Turn, role and phase of every character of a text, and from them of every token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int8, Int32

from qwen_scope.errors import InputError

Phase = Literal["text", "system", "user", "thinking", "answer", "tool_call", "tool_result"]
PHASES: tuple[Phase, ...] = get_args(Phase)

# The phase of what a message of this role holds; an assistant's is told apart by the markers inside its turn.
ROLES: dict[str, Phase] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "answer",
    "tool": "tool_result",
    "ipython": "tool_result",
    "function": "tool_result",
}


@dataclass(frozen=True)
class Span:
    """The characters `[start, end)` of a text that share turn, role and phase.

    Attributes:
        turn: the index of the message in its conversation; -1 for a system prompt that the template adds by itself, the
            number of messages for a generation prompt, 0 for a plain text.
        role: the message's role; `assistant` for a generation prompt, `text` for a plain text.
        phase: one of `PHASES`.
    """

    start: int
    end: int
    turn: int
    role: str
    phase: Phase


def phase_numbers(phases: Iterable[str]) -> list[int]:
    """Phases as indices into `PHASES`.

    Raises:
        InputError: none, or one that there is not.
    """
    named = [phases] if isinstance(phases, str) else list(phases)
    if unknown := [phase for phase in named if phase not in PHASES]:
        raise InputError(f"a phase is one of {', '.join(PHASES)}, not {unknown[0]!r}")
    if not named:
        raise InputError(f"name at least one phase: {', '.join(PHASES)}")
    return [PHASES.index(phase) for phase in PHASES if phase in named]


def token_phases(
    spans: Sequence[Span], offsets: Sequence[tuple[int, int]]
) -> tuple[Int32[np.ndarray, " seq"], Int8[np.ndarray, " seq"]]:
    """Turn and phase of every token, from the characters `[start, end)` it stands for.

    A token belongs where its last character does, so that a word which begins with the space before it goes with the
    word. A token without characters (BOS, another added token) goes with the next token that has some, or with the last
    one where none follows.

    Args:
        spans: of the tokenised text, from `Rendered.spans`.
        offsets: from a fast tokenizer, one pair per token.

    Returns:
        `turns (seq,)` int32 and `phases (seq,)` int8, indices into `PHASES`.
    """
    if not spans or not len(offsets):
        return np.zeros(len(offsets), np.int32), np.zeros(len(offsets), np.int8)
    places = np.asarray(offsets, np.int64).reshape(-1, 2)
    filled = np.flatnonzero(places[:, 1] > places[:, 0])
    if not len(filled):
        last = np.full(len(places), len(spans) - 1)
    else:
        # per token, the token with characters that it goes with: itself, or the next one
        goes_with = filled[np.minimum(np.searchsorted(filled, np.arange(len(places))), len(filled) - 1)]
        ends = np.array([span.end for span in spans])
        last = np.minimum(np.searchsorted(ends, places[goes_with, 1] - 1, side="right"), len(spans) - 1)
    turns = np.array([span.turn for span in spans], np.int32)
    phases = np.array([PHASES.index(span.phase) for span in spans], np.int8)
    return turns[last], phases[last]

"""A conversation with the model, steered or not turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any, Literal

from qwen_scope.errors import InputError
from qwen_scope.steer import Decoding, Generation, Intervention, generate, stream
from qwen_scope.text import render, thinking_marks

from .app_state import AppState
from .stages import stage
from .steering import measure

TURNS = 60
"""Turns of a conversation, the visitor's and the model's together."""


@dataclass(frozen=True)
class Turn:
    """What one side said.

    Attributes:
        thinking: of the model, what it wrote into its thinking block.
        recipe: what the answer was steered by, in words; empty where it was not.
        state: `writing` while it grows, then how it ended.
    """

    role: Literal["user", "assistant"]
    text: str
    thinking: str = ""
    recipe: str = ""
    state: str = ""


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """The turns as a chat template takes them."""
    return [
        {"role": one.role, "content": one.text, **({"reasoning_content": one.thinking} if one.thinking else {})}
        for one in turns
        if one.text or one.thinking
    ]


def asked(state: AppState, turns: Sequence[Turn], text: str) -> list[Turn]:
    """The conversation with what the visitor says next.

    Raises:
        InputError: an empty message, or a conversation that is too long for this page.
    """
    text = state.check_text(text, "message")
    if len(turns) + 2 > TURNS:
        raise InputError(f"a conversation on this page has up to {TURNS} turns; begin a new one")
    state.check_text("\n".join([*(one.thinking + one.text for one in turns), text]), "conversation")
    return [*turns, Turn("user", text)]


def answers(
    state: AppState, turns: Sequence[Turn], chat: str, chosen: Sequence[Intervention], recipe: str, how: Decoding,
    stop: Event,
) -> Iterator[Turn]:  # fmt: skip
    """The model's answer to a conversation as it grows; the last one is finished, or stopped where `stop` is set.

    Args:
        recipe: what it is steered by, in words.

    Raises:
        InputError: a conversation that the template refuses or that does not fit the model's context.
    """
    mode, scope = state.chat(chat), state.scope
    if mode is None:
        raise InputError("a conversation is put to the model by its chat template; choose how it is read")
    said = messages(turns)
    begins = render(scope.tokenizer, said, mode).next_phase == "thinking"
    marks = thinking_marks(scope.tokenizer, mode)
    measure(state, chosen)
    stage("reading the conversation, then writing")
    done: list[Generation] = []

    def run(on_text: Callable[[int, str], None]) -> list[Generation]:
        done[:] = generate(
            scope.model, scope.tokenizer, [said], chosen, saes=scope.saes, stats=scope.stats, decoding=how, chat=mode,
            on_text=on_text,
        )  # fmt: skip
        return done

    text, turn = "", Turn("assistant", "", recipe=recipe, state="writing")
    growing: Any = stream(run)
    try:
        for _, piece in growing:
            text += piece
            thinking, answer = apart(text, begins, marks)
            turn = replace(turn, text=answer, thinking=thinking)
            yield turn
            if stop.is_set():
                yield replace(turn, state="stopped")
                return
    finally:
        if hasattr(growing, "close"):
            growing.close()
    yield replace(turn, state=f"{len(done[0].tokens)} tokens" + ("" if done[0].finished else ", ran to the limit"))


def apart(text: str, begins_thinking: bool, marks: tuple[str, str] | None) -> tuple[str, str]:
    """What was thought and what is said in a text that the model writes, which may be unfinished.

    Args:
        begins_thinking: whether the prompt ends inside of a thinking block.
        marks: what opens and closes such a block.
    """
    if marks is None:
        return "", text
    opens, closes = marks
    if begins_thinking:
        thought, _, said = text.partition(closes)
        return thought.strip(), said.lstrip()
    before, opened, rest = text.partition(opens)
    if not opened or before.strip():
        return "", text
    thought, _, said = rest.partition(closes)
    return thought.strip(), said.lstrip()

"""A conversation with the model: what is thought and what is said, and what is refused."""

from __future__ import annotations

import threading

import pytest

from qwen_scope.errors import InputError
from qwen_scope.explorer import AppState, Limits, chatting, steering
from qwen_scope.explorer.chatting import TURNS, Turn, answers, apart, asked, messages
from qwen_scope.explorer.look.chat import chat_panel

MARKS = ("<think>", "</think>")


@pytest.mark.parametrize(
    ("text", "begins", "thinking", "said"),
    [
        ("<think>\nhm</think>\n\nYes", False, "hm", "Yes"),
        ("<think>\nhm", False, "hm", ""),
        ("hm</think>\n\nYes", True, "hm", "Yes"),
        ("hm", True, "hm", ""),
        ("Yes, <think> is a word", False, "", "Yes, <think> is a word"),
        ("Yes", False, "", "Yes"),
    ],
)
def test_thinking_is_told_apart_while_it_grows(text: str, begins: bool, thinking: str, said: str) -> None:
    assert apart(text, begins, MARKS) == (thinking, said)
    assert apart(text, False, None) == ("", text)


def test_turns_reach_the_template_with_their_thinking() -> None:
    turns = [Turn("user", "Hi"), Turn("assistant", "Yes", "hm"), Turn("user", "And?")]
    assert messages(turns) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes", "reasoning_content": "hm"},
        {"role": "user", "content": "And?"},
    ]


def test_a_conversation_is_bounded(state: AppState) -> None:
    few = AppState(state.scope, {}, Limits(characters=20))
    with pytest.raises(InputError, match="the message is empty"):
        asked(few, [], " ")
    with pytest.raises(InputError, match="the conversation has 24 characters"):
        asked(few, [Turn("user", "0123456789"), Turn("assistant", "01")], "0123456789")
    with pytest.raises(InputError, match="begin a new one"):
        asked(state, [Turn("user", "Hi")] * TURNS, "And?")
    with pytest.raises(InputError, match="chat template"):
        next(answers(state, [Turn("user", "Hi")], "plain", [], "", steering.decoding(state, {}), threading.Event()))


def test_an_answer_grows_and_is_steered_or_not(state: AppState) -> None:
    how = steering.decoding(state, {"max_new_tokens": 6, "sample": False})
    talk = [Turn("user", "Wo ist der Bahnhof?")]
    row = {**state.default_intervention(), "amount": 3.0}
    chosen = steering.interventions(state, [row])
    *growing, plain = answers(state, talk, "non_thinking", [], "", how, threading.Event())
    *_, steered = answers(state, talk, "non_thinking", chosen, "much German", how, threading.Event())
    assert [one.state for one in growing] == ["writing"] * len(growing)
    assert plain.text.startswith(growing[0].text)
    assert plain.text != steered.text
    assert (plain.recipe, steered.recipe) == ("", "much German")
    stop = threading.Event()
    stop.set()
    *_, last = answers(state, talk, "non_thinking", [], "", how, stop)
    assert last.state == "stopped"


def test_a_long_answer_is_shown_whole() -> None:
    said = "word " * 200
    assert said.strip() in str(chat_panel([Turn("user", "Hi"), Turn("assistant", said, chatting.__name__)]))

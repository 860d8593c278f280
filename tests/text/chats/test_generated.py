"""Generated tokens have the phases that the rendered conversation gives them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError
from qwen_scope.text import PHASES, GenerationPhases, render, token_phases

from .conftest import CALLS, REASONS, TEMPLATES
from .test_phases import call, say

pytestmark = pytest.mark.skipif(not TEMPLATES, reason="the templates lie in TRL's wheel")

ANSWERS = {
    "thinking and answer": say("assistant", "Take an  umbrella.\n\nIt rains.", reasoning_content="Hm, weather\n\nso"),
    "thinking and a call": say("assistant", "", reasoning_content="Hm", tool_calls=[call("weather", place="Bergen")]),
    "thinking, words, two calls": say(
        "assistant",
        "Let me see",
        reasoning_content="Hm",
        tool_calls=[call("weather", place="Bergen"), call("weather", place="Oslo")],
    ),
    "a quoted tag": say("assistant", "One writes <b> and </b>", reasoning_content="tags"),
    "unicode": say("assistant", "خوب 👩‍👩‍👧 e\u0301", reasoning_content="思考 \U0001f9ed"),
}


def tokens(tokenizer: PreTrainedTokenizerBase, rendered: Any) -> tuple[list[int], list[str]]:
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    _, found = token_phases(rendered.spans, encoded["offset_mapping"])
    return encoded["input_ids"], [PHASES[i] for i in found]


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("template", REASONS)
def test_as_in_the_finished_conversation(tokenizer: PreTrainedTokenizerBase, template: str, name: str) -> None:
    tokenizer.chat_template = TEMPLATES[template]
    question = [say("user", "Shall I take an umbrella?")]
    prompt = render(tokenizer, question, "thinking")
    ids, phases = tokens(tokenizer, render(tokenizer, [*question, ANSWERS[name]], "thinking"))
    begun, _ = tokens(tokenizer, prompt)
    assert ids[: len(begun)] == begun
    following = GenerationPhases(tokenizer, "thinking", prompt.next_phase)
    made = following.follow(ids[len(begun) :])
    assert made.dtype == "int8"
    assert [PHASES[i] for i in made] == phases[len(begun) :]


@pytest.mark.parametrize("template", CALLS)
def test_a_call_without_thinking(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = TEMPLATES[template]
    made = tokenizer("Let me see\n<tool_call>\n{}\n</tool_call>\n<tool_call>\n{}\n</tool_call><|im_end|>\n")[
        "input_ids"
    ]
    phases = GenerationPhases(tokenizer, "default", "answer")
    found = [phases.feed(token) for token in made]
    first = made.index(tokenizer.convert_tokens_to_ids("<tool_call>"))
    assert found == ["answer"] * first + ["tool_call"] * (len(made) - first)


def test_a_block_that_never_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TEMPLATES["qwen3_6"]
    made = tokenizer("Hm, <tool_call> is no call here <|im_end|>")["input_ids"]
    phases = GenerationPhases(tokenizer, "thinking", "thinking")
    assert {phases.feed(token) for token in made} == {"thinking"}
    assert phases.phase == "thinking"


def test_the_words_of_a_marker_are_no_marker(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TEMPLATES["qwen3"]
    made = [token for part in ("<", "think", ">", " so ", "</", "think", ">") for token in tokenizer(part)["input_ids"]]
    assert set(GenerationPhases(tokenizer, "default", "answer").follow(made)) == {PHASES.index("answer")}


@pytest.mark.slow
def test_a_marker_of_several_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Told by its text once it is complete: this tokenizer has no token for gpt-oss's or Gemma's markers."""
    tokenizer.chat_template = TEMPLATES["gemma4_v5"]
    made = tokenizer("<|channel>thought\nHm <b> so\n<channel|>Take it.")["input_ids"]
    phases = GenerationPhases(tokenizer, "default", "answer")
    texts: dict[str, str] = {"answer": "", "thinking": ""}
    for token in made:
        phase = phases.feed(token)
        texts[phase] += str(tokenizer.decode([token]))
    assert "Hm <b> so\n<channel|>" in texts["thinking"]
    assert texts["answer"].endswith("Take it.")
    assert "Hm" not in texts["answer"]


def test_a_plain_text_goes_on_as_text(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = render(tokenizer, "<think> of it", None)
    assert rendered.next_phase == "text"
    found = GenerationPhases(tokenizer, None, "text").follow(tokenizer("<think>\n</think>")["input_ids"])
    assert set(found) == {PHASES.index("text")}


def test_an_empty_generation(tokenizer: PreTrainedTokenizerBase) -> None:
    assert GenerationPhases(tokenizer, "default", "answer").follow([]).shape == (0,)


@pytest.mark.parametrize(("chat", "first"), [("default", "user"), ("default", "text"), (None, "answer")])
def test_beginnings_that_are_none(tokenizer: PreTrainedTokenizerBase, chat: Any, first: Any) -> None:
    with pytest.raises(InputError, match=r"begins in text|goes on as text"):
        GenerationPhases(tokenizer, chat, first)

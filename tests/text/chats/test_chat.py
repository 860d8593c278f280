"""A document becomes one text in one way: what it says, where it ends, and what is refused."""

from __future__ import annotations

import inspect
import json
import pickle
import sys
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError
from qwen_scope.text import CHATS, Span, render

from .conftest import CALLS, QWEN, REASONS, TEMPLATES
from .test_phases import DOCUMENTS, call, result, say

trl = pytest.mark.skipif(not TEMPLATES, reason="the templates lie in TRL's wheel")


@pytest.mark.parametrize("text", ["hello", " \n", "<|im_start|>user\n", "👩‍👩‍👧", "e\u0301"])
def test_a_plain_text_is_itself(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    rendered = render(tokenizer, text, None)
    assert rendered.text == text
    assert not rendered.chat
    assert rendered.spans == (Span(0, len(text), 0, "text", "text"),)


@pytest.mark.parametrize("chat", CHATS)
def test_a_text_with_chat_is_one_user_message(tokenizer: PreTrainedTokenizerBase, chat: Any) -> None:
    rendered = render(tokenizer, "hello", chat)
    assert rendered == render(tokenizer, [say("user", "hello")], chat)
    switch = {} if chat == "default" else {"enable_thinking": chat == "thinking"}
    assert rendered.text == tokenizer.apply_chat_template(
        [say("user", "hello")], tokenize=False, add_generation_prompt=True, **switch
    )
    assert rendered.chat


@trl
@pytest.mark.parametrize("template", QWEN)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_text_is_the_templates_own(tokenizer: PreTrainedTokenizerBase, template: str, name: str) -> None:
    """A conversation that the assistant ends has no generation prompt, any other has one."""
    tokenizer.chat_template = TEMPLATES[template]
    messages = DOCUMENTS[name]
    if template not in CALLS and any("tool_calls" in message for message in messages):
        with pytest.raises(InputError, match="leaves out the tool call 'weather'"):
            render(tokenizer, messages, "default")
        return
    finished = messages[-1]["role"] == "assistant"
    text = render(tokenizer, messages, "default").text
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not finished)
    assert text.endswith("<|im_end|>\n") == finished


@trl
@pytest.mark.parametrize("key", ["thinking", "reasoning_content", "reasoning"])
@pytest.mark.parametrize("template", REASONS)
def test_reasoning_under_any_of_its_names(tokenizer: PreTrainedTokenizerBase, template: str, key: str) -> None:
    tokenizer.chat_template = TEMPLATES[template]
    text = render(tokenizer, [say("user", "Ask"), say("assistant", "Reply", **{key: "Muse"})], "default").text
    assert "<think>\nMuse\n</think>\n\nReply" in text


@trl
@pytest.mark.parametrize("template", [*QWEN, "llama3", "gemma", "gemma3", "phi3", "smolvlm", "llava_next"])
def test_parts_are_their_text(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Some templates read strings only, some parts only, and some drop one of them without a word."""
    tokenizer.chat_template = TEMPLATES[template]
    parts = [{"type": "text", "text": "Ask"}, {"type": "text", "text": " one"}]
    rendered = render(tokenizer, [say("user", parts), say("assistant", [{"type": "text", "text": "Reply"}])], "default")
    assert rendered == render(tokenizer, [say("user", "Ask one"), say("assistant", "Reply")], "default")
    assert "Ask one" in rendered.text
    assert "Reply" in rendered.text


@trl
@pytest.mark.parametrize("template", [*CALLS, "deepseekv3", "lfm2_v2", "glm4moe"])
def test_tool_calls_in_every_form_are_one_text(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = TEMPLATES[template]
    arguments = {"place": "Tromsø", "days": 3}
    nested = call("weather", **arguments)
    as_text = {**nested, "function": {"name": "weather", "arguments": json.dumps(arguments)}}
    flat = {"name": "weather", "arguments": arguments}

    def text(one: Any, content: Any = "") -> str:
        messages = [say("user", "Ask"), {"role": "assistant", "content": content, "tool_calls": [one]}, result("Rain")]
        return render(tokenizer, messages, "default").text.replace("\\u00f8", "ø")

    assert text(nested) == text(as_text) == text(flat) == text(nested, None)
    assert "Tromsø" in text(nested)
    without = [say("user", "Ask"), {"role": "assistant", "tool_calls": [nested]}, result("Rain")]
    assert render(tokenizer, without, "default").text.replace("\\u00f8", "ø") == text(nested)


@pytest.mark.parametrize(
    ("document", "chat", "said"),
    [
        ("", None, "text 7 is empty"),
        ("", "default", "text 7 is empty"),
        ([], "default", "text 7 is empty"),
        ([say("user", "")], "default", "text 7 is empty"),
        ("a\ud800b", None, "half a surrogate pair"),
        ([say("user", "a\udc00")], "default", "half a surrogate pair"),
        ([say("user", "a"), say("assistant", "b", thinking="\ud800")], "default", "half a surrogate pair"),
        (
            [say("user", "a"), say("assistant", "", tool_calls=[call("f", x="\ud800")])],
            "default",
            "half a surrogate pair",
        ),
        ([say("user", "a")], None, "list of messages; pass chat='default'"),
        ("a", "loud", "chat is one of default, thinking, non_thinking"),
        (7, "default", "role and content"),
        (["a"], "default", "role and content"),
        ([{"role": "user"}], "default", "role and content"),
        ([{"content": "x"}], "default", "role and content"),
        ([{"role": "user", "content": None}], "default", "role and content"),
        ([{"role": "assistant", "content": None}], "default", "role and content"),
        ([{"role": "user", "content": 3}], "default", "role and content"),
        ([{"role": None, "content": "x"}], "default", "a role is a string"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "default", "a part that is no text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "default", "a part that is no text"),
        ([{"role": "user", "content": ["x"]}], "default", "role and content"),
        ([say("user", "a"), say("assistant", "b", thinking=3)], "default", "a reasoning that is 3"),
        (
            [say("user", "a"), say("assistant", "b", tool_calls=[{"function": {}}])],
            "default",
            "tool call without a name",
        ),
        ([say("user", "a"), say("assistant", "b", tool_calls=[{"name": "f", "arguments": 3}])], "default", "tool call"),
        ([say("user", "a"), say("assistant", "b", tool_calls="f")], "default", "role and content"),
        ([say("user", "a"), say("assistant", "b", tool_calls=[call("f")])], "default", "leaves out the tool call 'f'"),
    ],
)
def test_documents_that_are_refused(tokenizer: PreTrainedTokenizerBase, document: Any, chat: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        inspect.unwrap(render)(tokenizer, document, chat, where="text 7")  # without the tests' check of types
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template; pass the text without chat"),
        ("{{ raise_exception('roles must alternate') }}", "refuses text 0: roles must alternate"),
        ("{% for m in messages %}", "refuses text 0"),
        ("{{ messages[0]['content'].nothing.at_all }}", "refuses text 0"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages | of_tomorrow }}", "refuses text 0"),
        ("{{ ''.__class__.__mro__ }}{{ unsafe() }}", "refuses text 0"),
        ({"tool_use": "x", "rag": "y"}, "refuses text 0"),
    ],
)
def test_templates_that_are_refused(tokenizer: PreTrainedTokenizerBase, template: Any, said: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=said) as caught:
        render(tokenizer, "hello", "default")
    assert "\n" not in str(caught.value)


LOOP = "{% for i in range(99999) %}"
LOOPS = {
    "loops within loops": LOOP + LOOP + LOOP + "x" + 3 * "{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "on real conversations alone": "{% if 'sentinel' not in messages[0]['content'] %}" + LOOP + LOOP + "x"
    + 2 * "{% endfor %}" + "{% endif %}{{ messages[0]['content'] }}",
}  # fmt: skip


@pytest.mark.parametrize("template", LOOPS.values(), ids=LOOPS)
def test_a_template_that_does_not_end_is_stopped(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = template
    tracing = sys.gettrace()
    with pytest.raises(InputError, match=r"does not finish .* in [0-9,]+ steps: a loop in it may not end") as caught:
        render(tokenizer, "hello", "default")
    assert "\n" not in str(caught.value)
    assert sys.gettrace() is tracing


@pytest.mark.slow
def test_a_long_conversation_has_as_many_steps_as_it_needs(tokenizer: PreTrainedTokenizerBase) -> None:
    """A template that reads each letter twice takes more than a probe may."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m.content %}{% if c != '~' %}{{ c }}{% endif %}{% endfor %}{% endfor %}"
    )
    text = "a~b" * 30_000
    assert render(tokenizer, text, "default").text == text.replace("~", "")


@pytest.mark.parametrize("chat", ["thinking", "non_thinking"])
def test_templates_without_a_switch(tokenizer: PreTrainedTokenizerBase, chat: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="no thinking switch; pass chat='default'"):
        render(tokenizer, "hello", chat)


def test_named_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    """The one called default, or the one for tools where there are some."""
    tokenizer.chat_template = {
        "default": "<{{ messages[0]['content'] }}>",
        "tool_use": "({{ messages[0]['content'] }})",
    }
    assert render(tokenizer, "hello", "default").text == "<hello>"
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    assert render(tokenizer, "hello", "default", tools=[tool]).text == "(hello)"
    assert [(s.turn, s.phase) for s in render(tokenizer, "hello", "default").spans] == [(0, "user")]


def test_a_rendering_does_not_change_its_messages(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [say("user", [{"type": "text", "text": "Ask"}]), say("assistant", "Reply", thinking="Muse")]
    before = json.dumps(messages)
    assert render(tokenizer, messages, "default").spans
    assert json.dumps(messages) == before


def test_a_rendering_crosses_processes(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = render(tokenizer, "hello", "default")
    again = pickle.loads(pickle.dumps(rendered))
    assert again == rendered
    assert again.spans == rendered.spans

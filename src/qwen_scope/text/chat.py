"""A document as the text a model reads: a conversation through the tokenizer's chat template, or a plain text as is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError, brief, foreign

from .markers import Markers, Template, learn
from .options import CHATS, Chat
from .phases import ROLES, Phase, Span
from .spans import REASONING, SpanFinder, find_pieces

# `role` and `content`; an assistant's may have `reasoning_content` (or `thinking`) and `tool_calls`. A content is a
# string or a list of parts `{"type": "text", "text": ...}`.
Message = Mapping[str, Any]


@dataclass(frozen=True)
class _Conversation:
    """What the phases of a rendering are worked out from."""

    template: Template
    messages: list[dict[str, Any]]
    prompt: bool
    tools: Sequence[Any] | None
    where: str


@dataclass(frozen=True)
class Rendered:
    """A document as it will be tokenised.

    Attributes:
        text: the text; a conversation's holds BOS where its template writes one.
        chat: whether a chat template made it, so that the tokenizer adds no special tokens of its own.
    """

    text: str
    chat: bool = False
    _conversation: _Conversation | None = field(default=None, repr=False, compare=False)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Turn, role and phase of every character: spans in order, from the first character to the last.

        The end of a message and of a block (`<|im_end|>`, `</think>`, `</tool_call>`), with the whitespace after it,
        belongs to what it ends; all else that the template writes belongs to what it begins. So an assistant's header
        is `thinking` where a thinking block comes first, also the empty one of the non-thinking mode, and `tool_call`
        where the message holds nothing else. A generation prompt is a turn of its own. A plain text is one span.

        Worked out on first use, which renders the conversation once more.

        Raises:
            InputError: the template gives no markers to tell the phases by, or a role that phases don't know.
        """
        made = self._conversation
        if made is None:
            return (Span(0, len(self.text), 0, "text", "text"),)
        if other := [m["role"] for m in made.messages if m["role"] not in ROLES]:
            raise InputError(f"{made.where} has a message of role {other[0]!r}; phases are told for {', '.join(ROLES)}")
        markers = learn(made.template)

        def again(messages: Sequence[Mapping[str, Any]]) -> str:
            return made.template.render(messages, prompt=made.prompt, tools=made.tools, where=made.where)

        pieces = find_pieces(again, self.text, made.messages, markers, made.where)
        return SpanFinder(self.text, made.messages, markers, made.template.name).find(pieces, made.prompt)

    @property
    def next_phase(self) -> Phase:
        """The phase of a token generated after this text, before any marker: `thinking` in an open thinking block."""
        made = self._conversation
        if made is None:
            return "text"
        think, last = learn(made.template).think, self.spans[-1]
        prompt = self.text[last.start :] if last.turn == len(made.messages) else ""
        return "thinking" if think and prompt.rfind(think[0]) > prompt.rfind(think[1]) else "answer"


def render(
    tokenizer: PreTrainedTokenizerBase,
    document: str | Sequence[Message],
    chat: Chat | None,
    *,
    tools: Sequence[Any] | None = None,
    where: str = "text 0",
) -> Rendered:
    """A document as it will be tokenised.

    A conversation whose last message is the assistant's ends where the template ends it; any other gets the generation
    prompt. Reasoning, tool calls and contents are written in the form that the template reads: arguments as a mapping
    or as JSON, a content as a string or as parts.

    Args:
        document: a text, or messages.
        chat: None for a plain text, else one of `CHATS`: `default` for the template as it is, `thinking` or
            `non_thinking` with its switch set. A text becomes one user message.
        tools: what the template lists as tools, JSON schemas or functions.
        where: names the document in errors.

    Raises:
        InputError: an empty document, one that is not Unicode or is no text and no messages, messages without `chat`, a
            tokenizer without chat template, a template that refuses the messages, leaves out a tool call or has no
            thinking switch.
    """
    messages = [{"role": "user", "content": document}] if isinstance(document, str) else _messages(document, where)
    content = "".join(_words(message) for message in messages)
    if not content:
        raise InputError(f"{where} is empty")
    if not content.isascii():
        try:
            content.encode()
        except UnicodeEncodeError:
            raise InputError(f"{where} is not valid Unicode: it holds half a surrogate pair") from None
    if chat is None:
        if not isinstance(document, str):
            raise InputError(f"{where} is a list of messages; pass chat='default' to use the chat template")
        return Rendered(document)
    template = template_of(tokenizer, chat, tools=tools, where=where)
    markers = learn(template)
    if chat != "default" and not markers.switch:
        raise InputError("the tokenizer's chat template has no thinking switch; pass chat='default'")
    messages = [_fitted(message, markers) for message in messages]
    prompt = messages[-1]["role"] != "assistant"
    text = template.render(messages, prompt=prompt, tools=tools, where=where)
    for call in (call for message in messages for call in message.get("tool_calls") or ()):
        if call["function"]["name"] not in text:
            raise InputError(
                f"the tokenizer's chat template leaves out the tool call {call['function']['name']!r} of {where}"
            )
    return Rendered(text, True, _Conversation(template, messages, prompt, tools, where))


def template_of(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, *, tools: Sequence[Any] | None = None, where: str = "text 0"
) -> Template:
    """The tokenizer's chat template in one mode; of several named ones the one it takes for these tools.

    Raises:
        InputError: an unknown mode, no template, or named templates without one called `default`.
    """
    if chat not in CHATS:
        raise InputError(f"chat is one of {', '.join(CHATS)}, not {chat!r}")
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; pass the text without chat")
    with foreign(f"the tokenizer's chat template refuses {where}", InputError):
        source = tokenizer.get_chat_template(tools=list(tools) if tools else None)
    specials = tuple(sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()))
    return Template(source, specials, {"thinking": True, "non_thinking": False}.get(chat), tokenizer)


def thinking_marks(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[str, str] | None:
    """What opens and closes a thinking block, such as `<think>` and `</think>`; None where the template has none.

    Raises:
        InputError: as `template_of`.
    """
    return learn(template_of(tokenizer, chat)).think


def _messages(document: Any, where: str) -> list[dict[str, Any]]:
    """Messages with contents in one string and reasoning under one name; other keys as they are."""
    out: list[dict[str, Any]] = []
    with foreign(f"{where} is no text and no list of messages with role and content", InputError):
        for message in document:
            made = dict(message)
            if not isinstance(made["role"], str):
                raise InputError(f"{where} has a message whose role is {brief(made['role'])}; a role is a string")
            made["content"] = _content(made, where)
            reasoning = next((made[key] for key in REASONING if made.get(key)), None)
            for key in REASONING:
                made.pop(key, None)
            if reasoning is not None:
                if not isinstance(reasoning, str):
                    raise InputError(f"{where} has a reasoning that is {brief(reasoning)}; it is a string")
                made.update(dict.fromkeys(REASONING, reasoning))
            if not made.get("tool_calls"):
                made.pop("tool_calls", None)
            else:
                made["tool_calls"] = [_tool_call(call, where) for call in made["tool_calls"]]
            out.append(made)
    return out


def _content(message: dict[str, Any], where: str) -> str:
    content = message.get("content") if message.get("tool_calls") else message["content"]
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise InputError(
            f"{where} is no text and no list of messages with role and content: a content is a string or a list of text"
            f" parts, not {brief(content)}"
        )
    for part in content:
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise InputError(
                f"{where} has a part that is no text, {brief(dict(part))}; a part is {{'type': 'text', 'text': ...}}"
            )
    return "".join(part["text"] for part in content)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call in the nested form, from that or the flat one."""
    function = dict(call.get("function") or call)
    if not isinstance(function.get("name"), str) or not isinstance(function.get("arguments", {}), str | Mapping):
        raise InputError(f"{where} has a tool call without a name or with arguments of another kind, {brief(call)}")
    kept = {"name": function["name"], "arguments": function.get("arguments", {})}
    return {"type": "function", **{k: call[k] for k in ("id", "type") if k in call and "function" in call}} | {
        "function": kept
    }


def _words(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls") or ()
    return "".join(
        [message["content"], message.get(REASONING[0]) or "", *(json.dumps(call, ensure_ascii=False) for call in calls)]
    )


def _fitted(message: dict[str, Any], markers: Markers) -> dict[str, Any]:
    """A message in the form that the template reads."""
    made = dict(message)
    if markers.parts:
        made["content"] = [{"type": "text", "text": message["content"]}]
    if calls := message.get("tool_calls"):
        made["tool_calls"] = [{**call, "function": _function(call["function"], markers.mapping)} for call in calls]
    return made


def _function(function: Mapping[str, Any], mapping: bool) -> dict[str, Any]:
    arguments = function["arguments"]
    if mapping and isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except ValueError:  # left to the template, which may write it as it is
            read = None
        arguments = read if isinstance(read, dict) else arguments
    elif not mapping and not isinstance(arguments, str):
        arguments = json.dumps(dict(arguments), ensure_ascii=False)
    return {**function, "arguments": arguments}

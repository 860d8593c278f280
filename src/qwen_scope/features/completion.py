"""What a chat completion says, whatever a server makes of OpenAI's format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_scope.errors import FormatError, brief

from .wire import DEEPEST, MOST_VALUES, Unreached, costly

MOST_TOKENS = 10**8  # no single answer has more; a server that says so is not believed
THOUGHTS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
TEXTS = ("text", "output_text")


class BadAnswer(FormatError):
    """An answer that can't be used: no text, a refusal, or not what was asked for. Other answers may well be good."""


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: what is said, without thoughts.
        cut: it ended because it was as long as it may be.
        tokens: prompt and answer together as the server counts them; None where it says nothing that can be.
    """

    text: str
    cut: bool
    tokens: int | None


def read_completion(data: bytes) -> dict[str, Any]:
    """The JSON object of a reply.

    Raises:
        Unreached: no whole JSON, as of a connection that broke.   BadAnswer: no object, or one that is too large.
    """
    if costly(data):
        raise BadAnswer(
            f"no chat completion but JSON that is nested deeper than {DEEPEST} or has over {MOST_VALUES} values"
        )
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unreached(f"a reply that is no whole JSON: {data[:80]!r}") from error
    if not isinstance(reply, dict):
        raise BadAnswer(f"no chat completion but {brief(reply)}")
    return reply


def used_tokens(reply: Mapping[str, Any]) -> int | None:
    """The field `usage.total_tokens`, where it is a number that can be: whole, above 0 and not absurd."""
    usage = reply.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if type(total) is int and 0 < total <= MOST_TOKENS else None


def read_answer(reply: Mapping[str, Any]) -> Answer:
    """The text of the first choice; parts are joined, thoughts left out.

    Raises:
        BadAnswer: there is none.
    """
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices:
        said = reply.get("error")
        raise BadAnswer(f"no chat completion but {brief(said if said else reply)}")
    first = choices[0]
    message = first.get("message") if isinstance(first, dict) else None
    if not isinstance(message, dict):
        raise BadAnswer(f"no chat completion but a choice {brief(first)}")
    text = _text(message)
    return Answer(spoken(text), first.get("finish_reason") == "length", used_tokens(reply))


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") in TEXTS]
        if parts and all(isinstance(part.get("text"), str) for part in parts):
            return "".join(part["text"] for part in parts)
    refusal = message.get("refusal")
    if isinstance(refusal, str) and refusal:
        raise BadAnswer(f"no chat completion but a refusal: {brief(refusal)}")
    raise BadAnswer(f"no chat completion but a message without text: content is {brief(content)}")


def spoken(text: str) -> str:
    """A text without the thoughts that some servers leave in it; a template may have opened them in the prompt."""
    _, ended, rest = text.rpartition("</think>")
    return THOUGHTS.sub("", rest if ended else text).strip() if ended or "<think" in text else text

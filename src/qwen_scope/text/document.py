"""What a row of a corpus holds: a text or a conversation with its metadata, or why it can't be used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from string import Formatter
from typing import Any

from .read import Problem

DEEPEST = 50  # nested levels of metadata


@dataclass(frozen=True)
class Document:
    """One text or conversation.

    Attributes:
        text: a string, or a list of `{"role", "content"}` messages.
        meta: the other columns of its row, as plain JSON data.
        source, row: where it came from; rows count from 1.
        part: which part of a text that was cut (`parts_of`), counted from 0.
    """

    text: str | list[dict[str, Any]]
    meta: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    row: int = 0
    part: int = 0

    @property
    def plain(self) -> str:
        """Its text; of a conversation the contents of its messages, one after the other."""
        return self.text if isinstance(self.text, str) else "\n".join(message["content"] for message in self.text)


@dataclass(frozen=True)
class Unreadable:
    """A row that could not be used: where it is, the reason it is counted under, and its content."""

    source: str
    row: int
    reason: str
    detail: str


def document_of(value: Any, column: str, source: str, row: int, template: str | None = None) -> Document | Unreadable:
    """The document in a row, or why there is none; with a template its text is joined of several columns."""
    found = text_of(value if template is None else filled(value, template), column)
    source = source.encode("utf-8", "replace").decode()
    if isinstance(found, Problem):
        return Unreadable(source, row, found.reason, found.detail.encode("utf-8", "replace").decode()[:500])
    rest = {str(k): plain(v) for k, v in value.items() if template or k != column} if isinstance(value, Mapping) else {}
    return Document(found, rest, source, row)


def parts_of(found: Document | Unreadable, longest: int) -> Sequence[Document | Unreadable]:
    """A text in parts of at most so many characters, cut behind a line or else a space where the second half of a part
    has one; a conversation, or a row without a document, whole."""
    if not isinstance(found, Document) or not isinstance(found.text, str) or len(found.text) <= longest:
        return [found]
    text, begin, out = found.text, 0, list[Document]()
    while begin < len(text):
        end = begin + longest
        if end < len(text):
            half = begin + longest // 2
            end = text.rfind("\n", half, end) + 1 or text.rfind(" ", half, end) + 1 or end
        out.append(replace(found, text=text[begin:end], part=len(out)))
        begin = end
    return out


def text_of(value: Any, column: str) -> str | list[dict[str, Any]] | Problem:
    """The text or the messages in a row."""
    if isinstance(value, Problem):
        return value
    if isinstance(value, Mapping):
        if column not in value:
            has = ", ".join(map(repr, islice(value, 20)))
            return Problem("missing column", f"no {column!r}; it has {has or 'none'}")
        value = value[column]
    if isinstance(value, str):
        content, found = [value], value
    elif isinstance(value, list | tuple) and value and all(isinstance(m, Mapping) for m in value):
        found = [made for message in value if (made := message_of(message)) is not None]
        if len(found) < len(value):
            return Problem("not text", "a message lacks role or content")
        content = [text for message in value for text in within({**message, "role": None})]
    else:
        return Problem("not text", f"{type(value).__name__}: {value!r:.100}")
    if not any(content):
        return Problem("empty", "no character")
    for text in content:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                return Problem("not Unicode", f"half a surrogate pair at character {error.start}")
    return found


def filled(value: Any, template: str) -> str | Problem:
    """The text that a template makes of a row: strings as they are, other values as JSON writes them."""
    if isinstance(value, Problem):
        return value
    if not isinstance(value, Mapping):
        return Problem("not a row", f"{type(value).__name__}, which has no columns for the template")
    out = []
    for text, name, _, _ in Formatter().parse(template):
        out.append(text)
        if name is None:
            continue
        if name not in value:
            has = ", ".join(map(repr, islice(value, 20)))
            return Problem("missing column", f"no {name!r}; it has {has or 'none'}")
        cell = value[name]
        if cell is None or cell == "":
            return Problem("empty", f"nothing in {name!r}")
        out.append(cell if isinstance(cell, str) else json.dumps(plain(cell), ensure_ascii=False))
    return "".join(out)


def message_of(message: Mapping[str, Any]) -> dict[str, Any] | None:
    """A message as chat templates take it: a role, with text or parts of it as content; None if it is none.

    What a table fills in as missing is left out, and a message of tool calls alone has an empty content.
    """
    held = {str(key): plain(value) for key, value in message.items() if value is not None}
    if held.get("tool_calls"):
        held.setdefault("content", "")
    content = held.get("content")
    parts = isinstance(content, list) and bool(content) and all(isinstance(part, dict) for part in content)
    return held if isinstance(held.get("role"), str) and (isinstance(content, str) or parts) else None


def within(value: Any, depth: int = 0) -> Iterator[str]:
    """The strings in a value."""
    if isinstance(value, str):
        yield value
    elif depth < DEEPEST and isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from within(inner, depth + 1)


def plain(value: Any, depth: int = 0) -> Any:
    """Metadata as JSON keeps it: what JSON does not know, or nests too deep, becomes text."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping) and depth < DEEPEST:
        return {plain(str(k)): plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple) and depth < DEEPEST:
        return [plain(v, depth + 1) for v in value]
    return plain(f"{type(value).__name__}" if depth >= DEEPEST else str(value))


def meta_json(meta: Mapping[str, Any]) -> str:
    """The metadata of a document as the store keeps it."""
    return json.dumps(plain(meta), ensure_ascii=False)

"""What a chat template writes around the contents of a conversation, learnt by rendering sentinels."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError, foreign

from .steps import TooManySteps, at_most

# A template's text in pieces that are compared whole, so that `<|end|>` and `<|endoftext|>` share nothing.
ATOM = re.compile(r"<[^<>\n]{1,64}>|\[/?[A-Za-z_]{1,32}\]|\w+|(?s:.)")
_BOUNDS = re.compile(r"start|begin|end|[\W_]")

# Lines of compiled template that a conversation may take. TRL's templates take 250 to 4,500 for eight short messages,
# those that read a content letter by letter 16 per character.
STEPS, PER_CHARACTER = 100_000, 100

SYSTEM, USER, ANSWER, USER_2, ANSWER_2, REASON, NAME, VALUE, RESULT = (
    f"Zq{i}sentinel{i}qZ" for i in range(9)
)  # plain letters and digits: no template escapes or strips them


@dataclass(frozen=True)
class Template:
    """A chat template as one tokenizer applies it, with its thinking switch set in one way.

    Attributes:
        source: the template itself.
        specials: the tokenizer's special tokens, which a template can write.
        switch: `enable_thinking`, None to leave it alone.
        tokenizer: who renders; two tokenizers with equal templates and special tokens are the same here.
    """

    source: str
    specials: tuple[tuple[str, str], ...]
    switch: bool | None
    tokenizer: PreTrainedTokenizerBase = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """Whose template it is, for a sentence."""
        return str(self.tokenizer.name_or_path or type(self.tokenizer).__name__)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        prompt: bool,
        tools: Sequence[Any] | None = None,
        where: str = "a probe",
    ) -> str:
        """The text of a conversation, with the generation prompt if `prompt`.

        Raises:
            InputError: the template refuses the conversation.   TooManySteps: it does not come to an end.
        """
        switch: dict[str, Any] = {} if self.switch is None else {"enable_thinking": self.switch}
        steps = STEPS + PER_CHARACTER * len(repr((messages, tools)))
        with (
            foreign(f"the tokenizer's chat template refuses {where}", InputError),
            at_most(steps, f"the tokenizer's chat template does not finish {where}"),
        ):
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=prompt,
                **switch,
            )
            if not isinstance(text, str):
                raise InputError(f"the tokenizer's chat template gives no text for {where}")
            return text

    def tried(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str:
        """As `render`, but empty where the template refuses.

        Raises:
            TooManySteps: it does not come to an end.
        """
        try:
            return self.render(messages, prompt=prompt)
        except TooManySteps:
            raise
        except InputError:
            return ""


@dataclass(frozen=True)
class Markers:
    """What was learnt of a template.

    Attributes:
        switch: whether `enable_thinking` changes anything.
        parts: whether a content must be a list of `{"type": "text", "text": ...}` to be written.
        mapping: whether arguments of tool calls are a mapping, rather than JSON in a string.
        think: what opens and closes a thinking block, if the template or its generation prompt has one.
        call: what opens and closes a message's tool calls, None for either that nothing tells apart.
        ends: per role, what the template writes after the last message of a text.
        headers: per role, what it writes before a message's content.
    """

    switch: bool
    parts: bool
    mapping: bool
    think: tuple[str, str] | None
    call: tuple[str | None, str | None]
    ends: Mapping[str, str] = field(hash=False)
    headers: Mapping[str, str] = field(hash=False)

    def closing(self, role: str, gap: str, trail: str = "") -> int | None:
        """How many characters at the start of `gap` end a message of that role; None if none of them does.

        Args:
            trail: whitespace that may stand before the end.
        """
        longest = shared(gap, trail)
        for end in (self.ends.get(role, ""), *self.ends.values()):
            after = {skip: common(gap[skip:], end) for skip in range(longest, -1, -1)}
            skip = max(after, key=lambda skip: after[skip])
            if gap[skip : skip + after[skip]].strip() or (end and after[skip] == len(end)):
                return skip + after[skip]
        return None


def atoms(text: str) -> list[str]:
    """A template's text in pieces: markers such as `<think>`, words, single characters."""
    return ATOM.findall(text)


def is_marker(atom: str) -> bool:
    """Whether a piece is a marker such as `<|im_start|>` or `[INST]`."""
    return len(atom) > 2 and atom[0] + atom[-1] in ("<>", "[]")


def common(a: str, b: str) -> int:
    """The length in characters of the pieces that `a` and `b` both begin with."""
    length = 0
    for x, y in zip(ATOM.finditer(a), ATOM.finditer(b), strict=False):
        if x[0] != y[0]:
            break
        length += len(x[0])
    return length


def common_end(a: str, b: str) -> int:
    """The length in characters of the pieces that `a` and `b` both end with."""
    length = 0
    for x, y in zip(reversed(atoms(a[-len(b) :] if b else "")), reversed(atoms(b)), strict=False):
        if x != y:
            break
        length += len(x)
    return length


def shared(a: str, b: str) -> int:
    """How many characters `a` and `b` both begin with."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


@lru_cache(maxsize=16)
def learn(template: Template) -> Markers:
    """The markers of a template, from conversations of sentinels; what it refuses or drops stays unknown."""
    switch = len({_with(template, value).tried([_user(USER)], prompt=True) for value in (True, False)}) > 1
    parts = USER not in template.tried([_user(USER)]) and USER in template.tried([_user(USER, parts=True)])

    def say(role: str, text: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if parts else text, **more}

    user, answer = say("user", USER), say("assistant", ANSWER)
    ends: dict[str, str] = {}
    _note(ends, "user", _after(template.tried([user]), USER))
    _note(ends, "assistant", _after(template.tried([user, answer]), ANSWER))
    long = template.tried([user, answer, say("user", USER_2), say("assistant", ANSWER_2)])
    found = Markers(switch, parts, True, None, (None, None), ends, {})
    headers: dict[str, str] = {}
    for role, before, sentinel, last in (("assistant", "user", ANSWER, USER), ("user", "assistant", USER_2, ANSWER)):
        gap = _between(long, last, sentinel)
        if gap is not None:
            headers[role] = gap[found.closing(before, gap) or 0 :]
    think = _thinking(template, user, say, headers)
    mapping, call = _calls(template, user, say, {*ends.values(), *headers.values(), *(think or ())})
    given = say("tool", RESULT, name=NAME, tool_call_id=_call(mapping)["id"])
    result = template.tried([user, say("assistant", "", **_called(mapping)), given])
    _note(ends, "tool", _after(result, RESULT))
    return Markers(switch, parts, mapping, think, call, ends, headers)


def _thinking(template: Template, user: Any, say: Any, headers: Mapping[str, str]) -> tuple[str, str] | None:
    reason = {"reasoning_content": REASON, "thinking": REASON, "reasoning": REASON}
    for more, then in (({}, ANSWER), (_called(True), NAME)):  # some write it before tool calls alone
        text = template.tried([user, say("assistant", ANSWER, **reason, **more)])
        before, after = _between(text, USER, REASON), _between(text, REASON, then)
        if before is None or after is None:
            continue
        closes = next((atom for atom in atoms(after) if is_marker(atom)), None)
        if closes:
            opens = _opening(before, after[after.index(closes) + len(closes) :])
            return (opens, closes) if opens else None
    # The template writes no reasoning; its generation prompt may open a block, or hold an empty one.
    known = set(atoms(headers.get("assistant", "")))
    for value in (template.switch, True, False):
        prompt = _after(_with(template, value).tried([user], prompt=True), USER) or ""
        for atom in atoms(prompt):
            if is_marker(atom) and "/" not in atom and atom not in known:
                closes = atom[0] + "/" + atom[1:]
                dropped = template.tried([user, say("assistant", REASON + closes + ANSWER)])
                if re.fullmatch(r"<\w+>", atom) or closes in prompt or (ANSWER in dropped and REASON not in dropped):
                    return atom, closes
    return None


def _opening(before: str, header: str) -> str | None:
    """The shortest end of `before` that holds a marker and isn't in `header`, which precedes an answer."""
    pieces = atoms(before.strip())
    for i in range(len(pieces) - 1, -1, -1):
        suffix = "".join(pieces[i:])
        if any(map(is_marker, pieces[i:])) and suffix not in header:
            return suffix.strip()
    return None


def _calls(template: Template, user: Any, say: Any, texts: set[str]) -> tuple[bool, tuple[str | None, str | None]]:
    """Whether arguments are a mapping, and the markers of calls."""
    known = {atom for text in texts for atom in atoms(text)}
    for mapping in (True, False):
        alone = template.tried([user, say("assistant", "", **_called(mapping))])
        if NAME not in alone or VALUE not in alone:
            continue
        gap = _between(template.tried([user, say("assistant", ANSWER, **_called(mapping))]), ANSWER, NAME)
        gap = gap if gap is not None else _between(alone, USER, NAME) or ""
        opens = next((atom for atom in atoms(gap) if is_marker(atom) and atom not in known), None)
        tail = [atom for atom in atoms(_after(alone, VALUE) or "") if is_marker(atom)]
        stem = _BOUNDS.sub("", opens) if opens else ""
        closes = next((atom for atom in tail if stem and _BOUNDS.sub("", atom) == stem), tail[-1] if tail else None)
        return mapping, (opens, closes)
    return True, (None, None)


def _called(mapping: bool) -> dict[str, Any]:
    return {"tool_calls": [_call(mapping)]}


def _call(mapping: bool) -> dict[str, Any]:
    function = {"name": NAME, "arguments": {"key": VALUE} if mapping else json.dumps({"key": VALUE})}
    return {"id": "call00000", "type": "function", "function": function}


def _user(text: str, parts: bool = False) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text}] if parts else text}


def _with(template: Template, switch: bool | None) -> Template:
    return Template(template.source, template.specials, switch, template.tokenizer)


def _note(into: dict[str, str], role: str, text: str | None) -> None:
    if text is not None:
        into[role] = text


def _after(text: str, sentinel: str) -> str | None:
    return text[text.rindex(sentinel) + len(sentinel) :] if sentinel in text else None


def _between(text: str, first: str, second: str) -> str | None:
    start, end = text.rfind(first), text.rfind(second)
    return text[start + len(first) : end] if 0 <= start < end else None

"""Where each message stands in the rendering of its conversation.

The contents are found by rendering the conversation a second time with invisible marks round each of them: the marks
come out where the contents do, whatever the template drops, strips, moves or escapes, and whatever the contents quote.
That the second rendering without its marks equals the first proves that they changed nothing. What stands between the
contents is the template's own text, which `Markers` divides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwen_scope.errors import InputError, brief

from .markers import Markers, atoms, common, common_end, is_marker, shared
from .phases import ROLES, Phase, Span

Kind = Literal["content", "reasoning", "call"]
Render = Callable[[Sequence[Mapping[str, Any]]], str]
REASONING = ("reasoning_content", "thinking", "reasoning")

# Private-use planes for the marks; the first of which the text uses no character is taken.
# Where the marks of a message stand: round all that it holds; round what is not blank; at one place inside that, for
# templates that look at how a content begins and ends, which is then found from there letter by letter.
_WAYS = ("edges", "filled", "middle", "tag")
_BASES, _MARKS = (0xF0000, 0xF8000, 0x100000, 0x108000), 0x7FF0


@dataclass(frozen=True)
class Piece:
    """The characters `[start, end)` of a rendering that are what a message holds, or the name of a tool it calls."""

    start: int
    end: int
    turn: int
    role: str
    kind: Kind
    trail: str = ""  # whitespace that ends the content, which a template may strip


@dataclass(frozen=True)
class _Slot:
    """A string of a message and the part `[start, end)` of it that the marks enclose."""

    turn: int
    role: str
    kind: Kind
    text: str
    start: int
    end: int

    def piece(self, rendered: str, start: int | None, end: int | None) -> Piece:
        """Where the content lies, from where its marks came out; one of them may be lost with a part of it."""
        core, tail = len(self.text) - len(self.text.lstrip()), len(self.text.rstrip())
        if start is None or end is None:  # what is left reaches as far as it is the same, piece by piece
            first = start if start is not None else end or 0
            last = end if end is not None else first
            first -= common_end(rendered[:last], self.text[core : self.end]) if start is None else 0
            last += common(rendered[first:], self.text[self.start : tail]) if end is None else 0
        else:
            before, after = self.text[core : self.start], self.text[self.end : tail]
            first = start - shared(rendered[max(start - len(before), 0) : start][::-1], before[::-1])
            last = end + shared(rendered[end : end + len(after)], after)
        return Piece(first, last, self.turn, self.role, self.kind, self.text[tail:])


def find_pieces(
    render: Render, text: str, messages: Sequence[Mapping[str, Any]], markers: Markers, where: str
) -> list[Piece]:
    """The pieces of a rendering, in its order. What the template drops has none.

    Args:
        render: renders messages as `text` was rendered.
        text: the rendering of `messages`.

    Raises:
        InputError: the template treats some content otherwise when marks stand in it.
    """
    base = next((b for b in _BASES if not re.search(f"[{chr(b)}-{chr(b + _MARKS)}]", text)), None)
    if base is None:
        raise InputError(f"{where} uses every plane of private characters; phases can't be told")

    def tried(how: Mapping[int, str]) -> list[Piece] | None:
        marked, slots = _mark(messages, how, base, markers)
        if 2 * len(slots) > _MARKS:
            raise InputError(f"{where} has {len(slots)} contents; phases can be told for up to {_MARKS // 2}")
        try:
            out = render(marked)
        except InputError:  # a template may look at what a content begins with
            return None
        bare, events = _unmark(out, base)
        pieces = _pieces(bare, events, slots) if bare == text else []
        return None if bare != text or any(piece.start > piece.end for piece in pieces) else pieces

    pieces = tried(dict.fromkeys(range(len(messages)), "edges"))
    if pieces is not None:
        return pieces
    how: dict[int, str] = {}
    for turn, message in enumerate(messages):
        fits = next((way for way in _WAYS if tried({turn: way}) is not None), None)
        if fits is None:
            raise InputError(
                f"the chat template changes with the words of message {turn} of {where},"
                f" {brief(message['content'])}; phases can't be told"
            )
        how[turn] = fits
    pieces = tried(how)
    if pieces is None:
        raise InputError(f"the chat template changes with the words of {where}; phases can't be told")
    return pieces


def _string(content: Any) -> str:
    return content[0]["text"] if isinstance(content, list) else content or ""


def _mark(
    messages: Sequence[Mapping[str, Any]], how: Mapping[int, str], base: int, markers: Markers
) -> tuple[list[dict[str, Any]], list[_Slot]]:
    slots: list[_Slot] = []
    marked: list[dict[str, Any]] = []

    def put(turn: int, role: str, kind: Kind, text: str, way: str) -> str:
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        if start >= end and way != "edges":
            return text
        if start >= end:
            start = end = len(text)
        elif way == "middle":
            start = end = (start + end) // 2
        elif way == "tag" and ">" in text:
            start = end = text.index(">") + 1
        first = chr(base + 2 * len(slots))
        slots.append(_Slot(turn, role, kind, text, start, end))
        return text[:start] + first + text[start:end] + chr(ord(first) + 1) + text[end:]

    for turn, message in enumerate(messages):
        out, way, role = dict(message), how.get(turn, "none"), message["role"]
        marked.append(out)
        if way == "none":
            continue
        content, reasoning, calls = _string(message["content"]), message.get(REASONING[0]), message.get("tool_calls")
        inline = (
            _inline(content, markers) if role == "assistant" and not reasoning and way in ("edges", "filled") else None
        )
        if inline:
            start, inner, answer = inline
            opened = start - len(markers.think[0]) if start and markers.think else 0
            content = (
                (put(turn, role, "content", content[:opened], way) if content[:opened].strip() else content[:opened])
                + content[opened:start]
                + put(turn, role, "reasoning", content[start:inner], way)
                + content[inner:answer]
                + put(turn, role, "content", content[answer:], way)
            )
        elif content.strip() or not calls:
            content = put(turn, role, "content", content, way)
        out["content"] = [{"type": "text", "text": content}] if isinstance(message["content"], list) else content
        if reasoning:
            out.update(dict.fromkeys(REASONING, put(turn, role, "reasoning", reasoning, way)))
        if calls:
            out["tool_calls"] = [
                {
                    **call,
                    "function": {**call["function"], "name": put(turn, role, "call", call["function"]["name"], way)},
                }
                for call in calls
            ]
    return marked, slots


def _inline(content: str, markers: Markers) -> tuple[int, int, int] | None:
    """Where reasoning inside a content begins and ends and where the answer begins, as templates that read it there
    take it: from the last opening before the first end, and from the last end. None without an end."""
    if not markers.think or markers.think[1] not in content:
        return None
    opens, closes = markers.think
    inner = content.index(closes)
    opened = content.rfind(opens, 0, inner)
    if opened < 0 and not closes.startswith(
        "</"
    ):  # what also ends other things (`<|end|>`) ends no reasoning by itself
        return None
    return opened + len(opens) if opened >= 0 else 0, inner, content.rindex(closes) + len(closes)


def _unmark(out: str, base: int) -> tuple[str, list[tuple[int, int]]]:
    """A marked rendering without its marks, and each mark with its place in that."""
    events, parts, last, at = [], [], 0, 0
    for mark in re.finditer(f"[{chr(base)}-{chr(base + _MARKS)}]", out):
        parts.append(out[last : mark.start()])
        at += mark.start() - last
        last = mark.end()
        events.append((ord(mark[0]) - base, at))
    return "".join([*parts, out[last:]]), events


def _pieces(text: str, events: Sequence[tuple[int, int]], slots: Sequence[_Slot]) -> list[Piece]:
    first: dict[int, int] = {}  # a content that is written again, such as a tool's name beside its result, counts once
    for mark, at in events:
        first.setdefault(mark, at)
    found = [i for i in range(len(slots)) if 2 * i in first or 2 * i + 1 in first]
    pieces = [slots[i].piece(text, first.get(2 * i), first.get(2 * i + 1)) for i in found]
    pieces.sort(key=lambda piece: (piece.start, piece.end))
    kept: list[Piece] = []
    for piece in pieces:  # a content written inside another one stays with the outer one
        if not kept or piece.start >= kept[-1].end:
            kept.append(piece)
    return kept


class SpanFinder:
    """Divides a rendering among its messages: the contents are known, the template's text between them is shared out.

    What ends a message (`<|im_end|>`) or a block (`</think>`), with the whitespace after it, belongs to that; all else
    belongs to what it opens.
    """

    def __init__(self, text: str, messages: Sequence[Mapping[str, Any]], markers: Markers, name: str) -> None:
        self.text, self.messages, self.markers, self.name = text, messages, markers, name
        self.cuts: list[tuple[int, int, str, Phase]] = []  # start, turn, role, phase

    def find(self, pieces: Sequence[Piece], prompt: bool) -> tuple[Span, ...]:
        """Spans that cover the text in order.

        Raises:
            InputError: nothing tells where a message ends.
        """
        prev: Piece | None = None
        for piece in pieces:
            if prev and prev.kind == piece.kind == "call" and prev.turn == piece.turn:
                prev = piece  # what stands between two calls is what the first one passes
                continue
            at = self._before(piece) if prev is None else prev.end + self._closing(prev, piece)
            at = self._skipped(at, prev, piece)
            self._open(at, piece.start, piece.turn, piece.role, piece.kind)
            prev = piece
        self._tail(prev, prompt)
        return self._joined()

    def _cut(self, start: int, turn: int, role: str, phase: Phase) -> None:
        self.cuts.append((start, turn, role, phase))

    def _open(self, start: int, end: int, turn: int, role: str, kind: Kind) -> None:
        """A piece whose opening text begins at `start`; in a turn of the assistant that text may hold a block."""
        phase = ROLES[role]
        if role != "assistant":
            return self._cut(start, turn, role, phase)
        phase = "tool_call" if kind == "call" else phase
        opening = self.text[start:end]
        opens, closes = self._last(opening)
        if opens > closes and kind != "call":
            return self._cut(start, turn, role, "thinking")
        if 0 <= opens < closes and self.markers.think:
            self._cut(start, turn, role, "thinking")
            start += closes + len(self.markers.think[1])
            start += _blank(self.text[start:end])
        return self._cut(start, turn, role, phase)

    def _last(self, text: str) -> tuple[int, int]:
        """Where a thinking block is last opened and closed in the template's own text, -1 for never."""
        if not self.markers.think:
            return -1, -1
        return text.rfind(self.markers.think[0]), text.rfind(self.markers.think[1])

    def _before(self, piece: Piece) -> int:
        """Where the first message begins; what the template writes before it of its own is a system prompt."""
        header, opening = self.markers.headers.get(piece.role, ""), self.text[: piece.start]
        if ROLES[piece.role] == "system" or not header:
            return 0
        at = len(opening) - len(header) if opening.endswith(header) else opening.find(header)
        words = [atom for atom in atoms(opening[: max(at, 0)]) if not is_marker(atom) and not atom.isspace()]
        if not words:  # BOS alone
            return 0
        self._cut(0, -1, "system", "system")
        return at

    def _closing(self, prev: Piece, piece: Piece | None) -> int:
        """How many characters after `prev` close it."""
        gap = self.text[prev.end : piece.start if piece else len(self.text)]
        same, thinking = piece is not None and prev.turn == piece.turn, self.cuts[-1][3] == "thinking"
        opens, closes = self.markers.call
        at, trail = 0, prev.trail
        if thinking and self.markers.think and self.markers.think[1] in gap:
            at = gap.index(self.markers.think[1]) + len(self.markers.think[1])
            at += _blank(gap[at:])
        elif prev.kind == "call":
            # what the call passes may quote its end, so the last one counts
            at = gap.rfind(closes) + len(closes) if closes and closes in gap else 0
            trail = gap[at : at + _blank(gap[at:])]
        elif same and piece and piece.kind == "call":
            return gap.index(opens) if opens and opens in gap else shared(gap, trail)
        if same:
            return at + (shared(gap[at:], trail) if not at else 0)
        ended = self.markers.closing(prev.role, gap[at:], trail)
        if ended is not None:
            return at + ended
        if at:  # closed by the marker of a block, and nothing else
            return at
        return at + self._unended(prev, piece, gap[at:], trail)

    def _unended(self, prev: Piece, piece: Piece | None, gap: str, trail: str) -> int:
        """As `_closing`, where no known end of a message follows."""
        blank = shared(gap, trail)
        header = self.markers.headers.get(piece.role if piece else "assistant", "")
        if header and gap.endswith(header):
            return len(gap) - len(header)
        if header and header in gap:
            return gap.index(header)
        if gap.isspace() or not gap:
            return len(gap)
        if self.markers.ends.get(prev.role) == "":
            return blank
        first = next((atom for atom in atoms(gap) if is_marker(atom)), None)
        if first is None:
            raise InputError(
                f"the chat template of {self.name} gives no markers for the end of a message of role {prev.role!r};"
                " phases can't be told"
            )
        at = gap.index(first) + len(first)
        return at + _blank(gap[at:])

    def _skipped(self, at: int, prev: Piece | None, piece: Piece) -> int:
        """Where the opening of `piece` begins, after that of an empty message in between."""
        turn = prev.turn + 1 if prev else 0
        header, opening = self.markers.headers.get(piece.role, ""), self.text[at : piece.start]
        begins = opening.rfind(header)
        if not prev or turn >= piece.turn or not header or begins <= 0 or opening[begins + len(header) :].strip():
            return at
        self._open(at, at + begins, turn, self.messages[turn]["role"], "content")
        return at + begins

    def _tail(self, prev: Piece | None, prompt: bool) -> None:
        """What follows the last piece: its end, an empty last message, the generation prompt."""
        final = len(self.messages) - 1
        turn, role = (final + 1, "assistant") if prompt else (final, self.messages[final]["role"])
        if prev is None:
            return self._open(0, len(self.text), turn, role, "content")
        if not prompt and prev.turn >= final:
            if self.cuts[-1][3] != "thinking":
                return None
            at = prev.end + self._thought(self.text[prev.end :])
            return self._open(at, len(self.text), turn, role, "content") if at < len(self.text) else None
        at = prev.end + self._closing(prev, None)
        return self._open(at, len(self.text), turn, role, "content") if at < len(self.text) else None

    def _thought(self, rest: str) -> int:
        closes = self.markers.think[1] if self.markers.think else ""
        if not closes or closes not in rest:
            return len(rest)
        at = rest.index(closes) + len(closes)
        return at + _blank(rest[at:])

    def _joined(self) -> tuple[Span, ...]:
        spans: list[Span] = []
        ends = [start for start, *_ in self.cuts[1:]] + [len(self.text)]
        for (start, turn, role, phase), end in zip(self.cuts, ends, strict=True):
            if start == end:
                continue
            if spans and (spans[-1].turn, spans[-1].role, spans[-1].phase) == (turn, role, phase):
                spans[-1] = Span(spans[-1].start, end, turn, role, phase)
            else:
                spans.append(Span(start, end, turn, role, phase))
        return tuple(spans)


def _blank(text: str) -> int:
    return len(text) - len(text.lstrip())

"""A text of any length as tokens, a chunk at a time, so that memory follows the chunk and not the text."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int8, Int32
from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError, brief, foreign

from .chat import Message
from .document import Document
from .options import Chat
from .phases import token_phases
from .tokenize import check_tokenizer, display, render_document

# Characters that are tokenised at once, and how many of them two neighbours must agree on where one hands over.
CHUNK, MARGIN = 2**16, 256

# The ends of two neighbours differ by one more than a multiple of this. Where numbers are split into groups counted
# from their end, the groups then differ, and what a cut has made of a long number is not taken for agreement.
GROUPS = 60


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive tokens of a text.

    Attributes:
        ids: their ids.   strings: what each shows, as in `Tokens`; those of all chunks join to the text.
        turns, phases: turn and phase (an index into `PHASES`) of each, or None where they were not asked for.
        roles: the role of each turn of the text; empty where phases were not asked for.
    """

    ids: list[int]
    strings: list[str]
    turns: Int32[np.ndarray, " seq"] | None = None
    phases: Int8[np.ndarray, " seq"] | None = None
    roles: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Window:
    """A part of a text, tokenised for itself.

    Attributes:
        start, end: which characters of the text.
        ids: of its tokens, with those that the tokenizer adds before and after a text.
        spans: the characters of the text that each stands for.
        words: the number of its word, or None for an added token.
        text: the characters.
        inside: whether a seam may lie within a word.
    """

    start: int
    end: int
    ids: list[int]
    spans: list[tuple[int, int]]
    words: list[int | None]
    text: str
    inside: bool

    def begins_word(self, i: int) -> bool:
        """Whether a word begins with a token."""
        return self.words[i] is not None and (i == 0 or self.words[i] != self.words[i - 1])

    def begins_character(self, i: int) -> bool:
        """Whether a token shares no character with the one before it, nor may be reordered with it (a combining mark,
        which Unicode's normal forms sort among its neighbours), and is not an added one."""
        start, end = self.spans[i]
        apart = self.words[i] is not None and start < end and (i == 0 or self.spans[i - 1][1] <= start)
        return apart and not unicodedata.combining(self.text[start - self.start])

    def at(self, place: int) -> int:
        """The first token, added ones apart, that stands for characters from a place on."""
        reached = (i for i, (start, _) in enumerate(self.spans) if self.words[i] is not None and start >= place)
        return next(reached, len(self.ids))


def chunks(
    tokenizer: PreTrainedTokenizerBase,
    document: Document | str | Sequence[Message],
    *,
    chat: Chat | None = None,
    phases: bool = False,
) -> Iterator[Chunk]:
    """The tokens that `tokenize` gives for a text, without tokenising all of it at once where that can be avoided.

    Two windows that overlap are tokenised for themselves; where they give the same tokens over `MARGIN` characters, the
    second takes over from the first, where a word begins if there is any. Within a word this is done for byte-pair
    encodings alone: theirs are the tokens of the whole as soon as every two neighbours are those of a part. Where the
    windows do not agree (one word longer than both, a run of characters that is normalised as one), the first grows
    until they do, in the end to the whole rest of the text.

    Args:
        chat: as in `tokenize`.
        phases: also tell turn and phase of every token.

    Raises:
        InputError: as in `tokenize`, or the tokenizer fails.
    """
    check_tokenizer(tokenizer)
    if not isinstance(document, Document):
        document = Document(document if isinstance(document, str) else [dict(message) for message in document])
    rendered = render_document(tokenizer, document, chat)
    whole, roles = rendered.text, {span.turn: span.role for span in rendered.spans} if phases else {}
    backend: Any = tokenizer.backend_tokenizer
    inside = type(backend.model).__name__ == "BPE"

    def window(start: int, end: int) -> Window:
        part = whole[start:end]
        with foreign(f"the tokenizer fails on a text of {len(whole)} characters", InputError):
            found = tokenizer(part, add_special_tokens=chat is None, return_offsets_mapping=True, verbose=False)
        spans = [(start + first, start + last) for first, last in found["offset_mapping"]]
        return Window(start, end, found["input_ids"], spans, found.word_ids(), part, inside)

    here, first, shown = window(0, min(CHUNK, len(whole))), 0, 0
    if not here.ids and here.end == len(whole):
        raise InputError(f"the text ({brief(whole)}) has no token")
    while True:
        here, first, stop, then, first_then = handover(window, here, first, len(whole))
        last = then is None
        end = len(whole) if last else here.spans[stop][0]
        if first < stop:
            spans, names = here.spans[first:stop], tokenizer.convert_ids_to_tokens(here.ids[first:stop])
            base, tail = min(shown, min(spans)[0]), max(last for _, last in spans)
            # What no token covers goes to the next one if it is spaces, else to the last.
            kept = last or not whole[tail:end].isspace()
            relative = [(start - base, end - base) for start, end in spans]
            strings = display(whole[base:end], relative, names, whole=kept, shown=shown - base)
            turns, of = token_phases(rendered.spans, spans) if phases else (None, None)
            yield Chunk(here.ids[first:stop], strings, turns, of, roles if phases else {})
            shown = end if kept else tail
        if then is None:
            return
        assert first < stop, "a seam does not advance"
        assert then.end > here.end, "a window does not advance"
        here, first = then, first_then


def handover(
    window: Callable[[int, int], Window], here: Window, first: int, length: int
) -> tuple[Window, int, int, Window | None, int]:
    """Where the next window takes over: this one (longer, if need be), its own tokens `[first, stop)`, the next one,
    and the token it goes on with. The next one is None where this one reaches the end of the text."""
    place = here.spans[first][0] if first < len(here.ids) else here.start
    while here.end < length:
        begin = overlap(here, first)
        if begin is not None:
            then = window(begin, next_end(here, begin, length))
            if (found := seam(here, then, first)) is not None:
                return here, first, found[0], then, found[1]
        wider = min(length, here.start + 2 * (here.end - here.start))
        assert wider > here.end, "a window does not grow"
        longer = window(here.start, wider)
        if first:  # the text went on here before; where the longer window reads that otherwise, only the whole counts
            again = longer.at(place)
            if again == len(longer.ids) or longer.spans[again] != here.spans[first]:
                longer = window(0, length)
                again = longer.at(place)
            first = again
        here = longer
    return here, first, len(here.ids), None, 0


def overlap(here: Window, first: int) -> int | None:
    """Where the next window begins: a token near the end of this one, one that begins a word if there is any."""
    limit, least = here.end - 4 * MARGIN, here.start + (here.end - here.start) // 4
    for begins in (here.begins_word, here.begins_character):
        for i in range(len(here.ids) - 1, first, -1):
            if here.spans[i][0] < least:
                break
            if here.spans[i][0] <= limit and begins(i):
                return here.spans[i][0]
    return None


def next_end(here: Window, begin: int, length: int) -> int:
    """The end of the next window, which is always past the end of this one."""
    end = max(begin + CHUNK, here.end + GROUPS)
    return length if end >= length else end - (end - here.end - 1) % GROUPS


def seam(here: Window, then: Window, first: int) -> tuple[int, int] | None:
    """The same token in two windows, in the middle of a chunk in which they agree; None where they do not."""
    a, b, same = here.at(here.end - MARGIN), then.at(here.end - MARGIN), 0
    while a - same > first + 1 and b - same > 0 and alike(here, a - same - 1, then, b - same - 1):
        same += 1
    if not same or here.spans[a - 1][1] - here.spans[a - same][0] < MARGIN:
        return None
    middle = (here.spans[a - 1][1] + here.spans[a - same][0]) // 2
    # The token before the seam is one they agree on as well.
    inside = sorted(range(1, same), key=lambda back: abs(here.spans[a - back][0] - middle))
    found = [back for back in inside if here.begins_character(a - back)]
    words = [back for back in found if here.begins_word(a - back)]
    chosen = words or (found if here.inside else [])
    return (a - chosen[0], b - chosen[0]) if chosen else None


def alike(a: Window, i: int, b: Window, j: int) -> bool:
    """Whether two windows have the same token at the same place, and a word begins with it in both or in neither."""
    same = a.ids[i] == b.ids[j] and a.spans[i] == b.spans[j] and a.words[i] is not None and b.words[j] is not None
    return same and a.begins_word(i) == b.begins_word(j)

"""A text of any length as tokens, a stretch at a time: what is held follows the stretch, not the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError

from .tokens import Message, check_tokenizer, display, render

# Characters that are tokenised at once, and how many of them on either side of a seam are read twice.
STRETCH, MARGIN = 2**16, 256


@dataclass(frozen=True, eq=False)
class Stretch:
    """Consecutive tokens of a text.

    Attributes:
        ids: their ids.   strings: what each shows, as in `Tokens`; those of all stretches join to the text.
    """

    ids: list[int]
    strings: list[str]


def stretches(
    tokenizer: PreTrainedTokenizerBase, text: str | Sequence[Message], *, chat: str | None = None
) -> Iterator[Stretch]:
    """The tokens that `tokenize` gives for a text, without ever tokenising all of it at once.

    Seams lie between two words, as the tokenizer itself splits them, and what is within `MARGIN` characters of a seam
    is read from both sides: a rule that looks a little ahead or back sees what it would see in the whole. A single word
    longer than a stretch, such as a megabyte of one letter, is cut inside; there alone the tokens may differ.

    Args:
        chat: as in `tokenize`.

    Raises:
        InputError: as in `tokenize`.
    """
    check_tokenizer(tokenizer, chat)
    whole = render(tokenizer, text, chat, 0)
    read = seam = shown = 0  # where reading starts, which token is the next, which character is the next to show
    while True:
        part = whole[read : read + STRETCH]
        last = read + len(part) == len(whole)
        encoded = tokenizer(part, add_special_tokens=chat is None, return_offsets_mapping=True, verbose=False)
        ids, words, base = encoded["input_ids"], encoded.word_ids(), min(read, shown)
        spans = [(start + read - base, end + read - base) for start, end in encoded["offset_mapping"]]
        inside = (i for i, word in enumerate(words) if word is not None and spans[i][0] >= seam - base)
        first = next(inside, len(ids)) if seam else 0
        stop = len(ids) if last else next_seam(words, spans, first, read + len(part) - MARGIN - base)
        end = base + spans[stop][0] if stop < len(ids) else read + len(part)
        if first < stop:
            names, tail = tokenizer.convert_ids_to_tokens(ids[first:stop]), base + max(e for _, e in spans[first:stop])
            # What no token covers goes to the next one if it is spaces, else to the last.
            kept = last or not whole[tail:end].isspace()
            strings = display(whole[base:end], spans[first:stop], names, whole=kept, shown=shown - base)
            yield Stretch(ids[first:stop], strings)
            shown = end if kept else tail
        elif last and not seam:
            raise InputError(f"text 0 ({whole!r:.100}) has no token")
        if last:
            return
        seam = end
        again = [base + spans[i][0] for i in word_starts(words, 0, stop)] if begins_word(words, stop) else []
        read = max((at for at in again if seam - STRETCH // 2 <= at <= seam - MARGIN), default=seam)


def next_seam(words: Sequence[int | None], spans: Sequence[tuple[int, int]], first: int, limit: int) -> int:
    """The last token up to a character with which a word begins; else with which a character begins; else the end."""
    for begins in (begins_word, lambda words, i: words[i] is not None and spans[i - 1][0] < spans[i][0]):
        for i in range(len(words) - 1, first, -1):
            if spans[i][0] <= limit and begins(words, i):
                return i
    return len(words)


def word_starts(words: Sequence[int | None], first: int, stop: int) -> Iterator[int]:
    """The tokens between two with which a word begins."""
    return (i for i in range(first + 1, stop) if begins_word(words, i))


def begins_word(words: Sequence[int | None], i: int) -> bool:
    """Whether a word begins with a token."""
    return i < len(words) and words[i] is not None and words[i] != words[i - 1]

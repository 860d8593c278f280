"""What a command makes of the rows of a corpus, those that can't be used passed over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from qwen_scope.errors import InputError

from .corpus import Corpus
from .document import Document
from .options import Chat
from .unused import tell_unused

T = TypeVar("T")
NO_CHAT = "a conversation, not a text"


class PassOver(InputError):
    """Raised by what reads a row that can't be used; its message is the reason that such rows are counted by."""


def usable(
    corpus: Corpus, use: Callable[[Document], T | None], n: int | None = None, unused: Counter[str] | None = None
) -> list[T]:
    """What `use` makes of the rows of a corpus, at most `n`; how many could not be used is said in a warning.

    Args:
        use: raises `PassOver` for a row that can't be used; None leaves a row out that is not asked for.
        unused: gets the rows that can't be used added, by reason.
    """
    out: list[T] = []
    counts: Counter[str] = Counter()
    for found in corpus.rows():
        if n is not None and len(out) >= n:
            break
        if not isinstance(found, Document):
            counts[found.reason] += 1
            continue
        try:
            value = use(found)
        except PassOver as why:
            counts[str(why)] += 1
            continue
        if value is not None:
            out.append(value)
    if out:
        tell_unused(counts, len(out) + counts.total(), corpus.name)
    if unused is not None:
        unused.update(counts)
    return out


def only_text(found: Document) -> str:
    """The text of a row."""
    if not isinstance(found.text, str):
        raise PassOver(NO_CHAT)
    return found.text


def as_read(found: Document, chat: Chat | None) -> str | list[dict[str, Any]]:
    """The text of a row, or with `chat` its conversation, which is rendered where it is tokenised."""
    return only_text(found) if chat is None else found.text

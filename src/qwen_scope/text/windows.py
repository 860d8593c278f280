"""The documents of a corpus some hundred at a time, for work that is cheaper on many of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from qwen_scope.errors import InputError, check_count

from .corpus import Corpus
from .document import Document
from .unused import tell_unused
from .usable import NO_CHAT

WINDOW = 512  # sorted by length, that many share passes through a model


def windows(corpus: Corpus, n: int = WINDOW, *, any_kind: bool) -> Iterator[list[Document]]:
    """The documents of a corpus in their order, up to `n` at a time.

    Args:
        any_kind: take conversations too; without, they are passed over, and a warning says how many.

    Raises:
        InputError: conversations alone, and they are not taken.
    """
    check_count("n", n)
    stream, left_out, taken = iter(corpus), 0, 0
    while some := list(islice(stream, n)):
        kept = [one for one in some if any_kind or isinstance(one.text, str)]
        left_out, taken = left_out + len(some) - len(kept), taken + len(kept)
        if kept:
            yield kept
    if left_out and taken:
        tell_unused({NO_CHAT: left_out}, left_out + taken, corpus.name)
    elif left_out:
        raise InputError(f"{corpus.name} holds nothing but conversations; with --chat default they are read")

"""Which documents a run kept out of training, so that they are found again in the same text, and how it read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qwen_scope.errors import FormatError
from qwen_scope.files import Fields
from qwen_scope.sae import SAE
from qwen_scope.text import CHATS, Chat, Corpus, Together

KEY = "held_out"
"""Where the record is in an SAE's `meta` and files."""

EARLIER = {"row": "context_length", "rows": "batch_size"}
"""Names of fields in SAEs of version 0.1."""

LATER = ("shuffle", "longest")
"""Fields that earlier SAEs lack."""


@dataclass(frozen=True)
class HeldOut:
    """The documents that training did not see, and how they were read when the SAEs were measured.

    Attributes:
        text: a digest of the sources with their sizes and of how they are cut into documents, wherever they lie.
        every: every `every`-th document was kept out.
        context_length: tokens per row.   batch_size: rows per forward pass.
        tokens: about how many were measured on; 0 for none.
        chat: how conversations were rendered.
        shuffle: the seed of the order in which they were read; None where they were read as they stand.
        longest: the characters at which long ones were cut; None where they were not.
    """

    text: str
    every: int
    context_length: int
    batch_size: int
    tokens: int
    chat: Chat | None
    shuffle: int | None = None
    longest: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return asdict(self)

    def is_of(self, corpus: Corpus) -> bool:
        """Whether these documents are of that text, cut in the same way."""
        return self.text == digest(corpus)


def text_source(data: str | tuple[str, ...]) -> str | Together:
    """What `Corpus` takes for the places of a text."""
    return data if isinstance(data, str) else Together(data)


def digest(corpus: Corpus) -> str:
    """What tells one text from another: its files' names below the folder with their sizes, and the options."""
    return hashlib.sha256(json.dumps(corpus.description, sort_keys=True, default=str).encode()).hexdigest()


def held_out_of(saes: Iterable[SAE]) -> HeldOut | None:
    """The record that all SAEs carry; None where one carries none, or another one.

    Raises:
        FormatError: a record that is none.
    """
    found: list[HeldOut] = []
    for sae in saes:
        if KEY not in sae.meta:
            return None
        what, record = f"{KEY!r} in the files of {sae.identity}", sae.meta[KEY]
        if isinstance(record, Mapping):
            record = {EARLIER.get(name, name): value for name, value in record.items()}
        read = Fields(record, what, [name for name in HeldOut.__dataclass_fields__ if name not in LATER], LATER)
        chat = read.maybe(read.text, "chat")
        if chat is not None and chat not in CHATS:
            raise FormatError(f"'chat' of {what} is one of {', '.join(CHATS)}, not {chat!r}")
        size = read.count("context_length", 2), read.count("batch_size", 1)
        order = tuple(read.maybe(read.count, name) for name in LATER)
        found.append(HeldOut(read.text("text"), read.count("every", 2), *size, read.count("tokens"), chat, *order))
    return found[0] if found and len(set(found)) == 1 else None

"""Documents packed into full rows of tokens, with a cursor."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import FormatError, InputError

from .corpus import Corpus
from .document import Document
from .options import Chat
from .tokenize import start_ids, token_ids

# Documents are tokenised this many at a time.
CHUNK = 64


class TokenRows:
    """Documents packed into full rows of tokens: one after the other, the tokenizer's end-of-text token between them.

    A row begins with what the tokenizer puts before a text (a BOS, for Gemma), also in the middle of a document; it is
    never padded. A document may be cut over two rows.

    Args:
        context_length: tokens per row.   batch_size: rows per batch.
        chat: render conversations with the chat template, in this mode; a plain text becomes one user message.

    Raises:
        InputError: the tokenizer has no chat template, rows without room, or, while it is read, a document that is a
            conversation although `chat` is None.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context_length: int = 512,
        batch_size: int = 16,
        chat: Chat | None = None,
    ) -> None:
        if chat is not None and not tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template; read the texts without chat")
        self.start = start_ids(tokenizer)
        if context_length <= len(self.start) or batch_size < 1:
            raise InputError(f"a batch needs at least one row of one token, got {batch_size} rows of {context_length}")
        self.corpus, self.tokenizer = corpus, tokenizer
        self.chat: Chat | None = chat
        self.context_length, self.batch_size = context_length, batch_size
        last: Any = tokenizer.eos_token_id
        self.end: list[int] = [] if last is None else [last]
        # Documents with tokens not yet given out: the corpus' cursor before each, and its ids.
        self.waiting: deque[tuple[dict[str, int], list[int]]] = deque()
        self.taken_of_first = 0

    def take(self, tokens: int) -> list[Int[Tensor, "batch_size context_length"]]:
        """The first batches, of about this many tokens together and at least one; fewer where the corpus ends."""
        return list(islice(self, max(1, tokens // (self.context_length * self.batch_size))))

    def __iter__(self) -> Iterator[Int[Tensor, "batch_size context_length"]]:
        stream = iter(self.corpus)
        batch: list[list[int]] = []
        while True:
            row = self._next_row(stream)
            if row is not None:
                batch.append(row)
            if batch and (row is None or len(batch) == self.batch_size):
                yield torch.tensor(batch, dtype=torch.int64)
                batch = []
            if row is None:
                return

    def _next_row(self, stream: Iterator[Any]) -> list[int] | None:
        """The next full row; None where no more documents fill one, whose tokens then stay."""
        while True:
            # A document brings what the tokenizer puts before it; elsewhere a row is given it.
            ids = self.waiting[0][1] if self.waiting else []
            begins = not self.taken_of_first and ids[: len(self.start)] == self.start
            start = [] if begins else self.start
            if sum(len(ids) for _, ids in self.waiting) - self.taken_of_first >= self.context_length - len(start):
                return start + self._take(self.context_length - len(start))
            found = self._tokenised(stream)
            if not found:
                return None
            self.waiting.extend(found)

    def _tokenised(self, stream: Iterator[Document]) -> list[tuple[dict[str, int], list[int]]]:
        """The next few documents, each with the cursor before it."""
        places, documents = [], []
        while len(documents) < CHUNK:
            place = self.corpus.cursor()
            document = next(stream, None)
            if document is None:
                break
            places.append(place)
            documents.append(document)
        ids = token_ids(self.tokenizer, documents, self.chat)
        return [(place, [*some, *self.end]) for place, some in zip(places, ids, strict=True)]

    def _take(self, n: int) -> list[int]:
        """The next n tokens; where it stops is remembered as a document and an offset in it."""
        out: list[int] = []
        while len(out) < n:
            ids = self.waiting[0][1]
            part = ids[self.taken_of_first : self.taken_of_first + n - len(out)]
            out += part
            self.taken_of_first += len(part)
            if self.taken_of_first == len(ids):
                self.waiting.popleft()
                self.taken_of_first = 0
        return out

    def cursor(self) -> dict[str, Any]:
        """The corpus' cursor before the document that the next token is from, and how many of its tokens are taken."""
        return {"corpus": self.waiting[0][0] if self.waiting else self.corpus.cursor(), "taken": self.taken_of_first}

    def seek(self, cursor: Mapping[str, Any]) -> None:
        """Go on from a cursor; to be called before the first batch is taken.

        Raises:
            FormatError: the cursor of an earlier version, which counted documents in another way.
        """
        if "corpus" not in cursor:
            raise FormatError("the place in the text was kept by an earlier version; finish the run with that one")
        self.corpus.seek(cursor["corpus"])
        self.waiting.clear()
        self.taken_of_first = int(cursor["taken"])

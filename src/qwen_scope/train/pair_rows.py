"""Documents read each by itself, in padded batches that hold whole documents, with the phase of every token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError
from qwen_scope.text import PHASES, Chat, Corpus, Document, chunks, padded, start_ids, tell_unused

BATCH_TOKENS = 4096
HOPELESS = 10_000  # rows without a document of use after which a corpus is given up
LEAST_DOCUMENTS = 64
"""No document gives more than this part of the tokens that are asked for, so that there are documents to resample."""

TEXT = PHASES.index("text")


@dataclass(frozen=True, eq=False)
class DocumentRows:
    """Rows of whole documents, padded on the right.

    Attributes:
        ids, mask: `(rows, row)` int64; the mask is 1 for a token.
        documents: the number of each row's document, `(rows,)`.
        phases: of each token, an index into `PHASES`, `(rows, row)`.
    """

    ids: Int[Tensor, "rows row"]
    mask: Int[Tensor, "rows row"]
    documents: Int[Tensor, " rows"]
    phases: Int[Tensor, "rows row"]

    @classmethod
    def each(cls, ids: Int[Tensor, "rows row"], first: int) -> DocumentRows:
        """Full rows of token ids, each a document of its own, numbered from `first` on."""
        numbers = torch.arange(first, first + len(ids))
        return cls(ids, torch.ones_like(ids), numbers, torch.full_like(ids, TEXT))


def from_rows(rows: Iterable[Tensor]) -> list[DocumentRows]:
    """Batches of full rows of token ids, each row a document of its own."""
    found: list[DocumentRows] = []
    for ids in rows:
        found.append(DocumentRows.each(ids, sum(len(one.ids) for one in found)))
    return found


def document_rows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, context_length: int, tokens: int, chat: Chat | None = None
) -> list[DocumentRows]:
    """About `tokens` tokens of the corpus, in its order, as rows of at most `context_length`.

    Of one document at most the 64th part of `tokens` is read, or one row. A row that begins within a document begins
    with what the tokenizer puts before a text. Where the chat template gives no markers, all tokens are `text`.

    Raises:
        InputError: no document has two tokens, or the tokenizer has no chat template.
    """
    if chat is not None and not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; read the texts without chat")
    lead, most, left = start_ids(tokenizer), max(context_length, tokens // LEAST_DOCUMENTS), tokens
    first = ""  # why the first document could not be read
    documents: list[list[tuple[list[int], list[int]]]] = []
    unused: Counter[str] = Counter()
    for found in corpus.rows():
        if left <= 0 or (not documents and unused.total() >= HOPELESS):
            break
        if not isinstance(found, Document):
            unused[found.reason] += 1
            continue
        try:
            ids, phases = tokenised(tokenizer, found, chat, most)
        except InputError as error:
            unused["no tokens"] += 1
            first = first or str(error)
            continue
        if len(ids) > 1:
            left -= len(ids)
            documents.append(cut(ids, phases, lead, context_length))
    if not documents:
        why = f": {first}" if first else ""
        raise InputError(f"{corpus.name} has no document of at least two tokens to measure on{why}")
    tell_unused(unused, len(documents) + unused.total(), corpus.name)
    return batches(documents)


def tokenised(
    tokenizer: PreTrainedTokenizerBase, document: Document, chat: Chat | None, most: int
) -> tuple[list[int], list[int]]:
    """The first `most` tokens of a document with their phases.

    Raises:
        InputError: it can't be read.
    """
    if chat is not None:
        with suppress(InputError):  # of a template without markers, which tells no phases
            return first_tokens(tokenizer, document, chat, most, phases=True)
    return first_tokens(tokenizer, document, chat, most, phases=False)


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, document: Document, chat: Chat | None, most: int, phases: bool
) -> tuple[list[int], list[int]]:
    """Ids and phases of the first tokens."""
    ids: list[int] = []
    told: list[int] = []
    for chunk in chunks(tokenizer, document, chat=chat, phases=phases):
        ids += chunk.ids
        told += [TEXT] * len(chunk.ids) if chunk.phases is None else chunk.phases.tolist()
        if len(ids) >= most:
            break
    return ids[:most], told[:most]


def cut(ids: list[int], phases: list[int], lead: list[int], length: int) -> list[tuple[list[int], list[int]]]:
    """A document as rows of at most `length` tokens; a last row without room for a prediction is left out."""
    rows = [(ids[:length], phases[:length])]
    step = max(1, length - len(lead))
    for at in range(length, len(ids), step):
        part, of = ids[at : at + step], phases[at : at + step]
        if len(lead) + len(part) > 1:
            rows.append(([*lead, *part], [*of[:1] * len(lead), *of]))
    return rows


def batches(documents: Sequence[Sequence[tuple[list[int], list[int]]]]) -> list[DocumentRows]:
    """Whole documents in batches of about `BATCH_TOKENS` tokens, those of like length together."""
    order = sorted(range(len(documents)), key=lambda i: sum(len(ids) for ids, _ in documents[i]))
    found: list[DocumentRows] = []
    held: list[int] = []
    size = 0
    for at, i in enumerate(order):
        held.append(i)
        size += sum(len(ids) for ids, _ in documents[i])
        if size >= BATCH_TOKENS or at == len(order) - 1:
            found.append(batch([(n, row) for n in held for row in documents[n]]))
            held, size = [], 0
    return found


def batch(rows: Sequence[tuple[int, tuple[list[int], list[int]]]]) -> DocumentRows:
    """Rows with the numbers of their documents as one batch."""
    ids, mask = padded([ids for _, (ids, _) in rows])
    phases, _ = padded([phases for _, (_, phases) in rows])
    return DocumentRows(ids, mask, torch.tensor([number for number, _ in rows]), phases)


def units(rows: Sequence[DocumentRows]) -> tuple[list[Tensor], np.ndarray]:
    """Every document's phases numbered through: per batch the number of each token's, and all `(document, phase)`."""
    keys = [one.documents[:, None] * len(PHASES) + one.phases for one in rows]
    every, number = torch.cat([key.flatten() for key in keys]).unique(return_inverse=True)
    parts = number.split([key.numel() for key in keys])
    known = np.stack([every.numpy() // len(PHASES), every.numpy() % len(PHASES)], axis=1)
    return [part.reshape(key.shape) for part, key in zip(parts, keys, strict=True)], known

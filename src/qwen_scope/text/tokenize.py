"""Text to token ids, with the piece of text every token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int8, Int32
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError, brief, foreign

from .chat import Message, Rendered, render
from .document import Document
from .options import Chat
from .phases import token_phases


@dataclass(frozen=True, eq=False)
class Tokens:
    """A padded batch of tokenised texts.

    Attributes:
        input_ids: token ids, `(batch, seq)` int64.
        attention_mask: 1 for a token, 0 for padding, `(batch, seq)` int64.
        texts: what was tokenised, after any chat template.
        offsets: per text and token, the characters `[start, end)` of the text it comes from; tokens that share one
            character (a byte-level piece of it each) have the same offsets, and an added token such as BOS has (0, 0).
        strings: per text and token, what to display. A character split over several tokens shows at the first of them
            and the others are empty, so the strings join to the text (to its beginning where it was truncated); an
            added token such as BOS shows its own name.
        rendered: per text, what knows the turn, role and phase of its characters.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    texts: list[str]
    offsets: list[list[tuple[int, int]]]
    strings: list[list[str]]
    rendered: list[Rendered]

    def __len__(self) -> int:
        """How many texts."""
        return len(self.texts)

    @property
    def lengths(self) -> list[int]:
        """How many tokens each text has, padding not counted."""
        return [len(row) for row in self.strings]

    def phases(self, text: int) -> tuple[Int32[np.ndarray, " seq"], Int8[np.ndarray, " seq"]]:
        """Turn and phase (an index into `PHASES`) of every token of one text, each `(seq,)`, padding not counted.

        Raises:
            InputError: the chat template gives no markers to tell the phases by.
        """
        return token_phases(self.rendered[text].spans, self.offsets[text])

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens with ids and mask on `device`."""
        return replace(self, input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device))


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | Sequence[Message]],
    *,
    max_length: int | None,
    truncate: bool = False,
    chat: Chat | None = None,
    padding_side: str = "right",
) -> Tokens:
    """Tokenise texts into one padded batch, with character offsets and display strings.

    No BOS is added unless the tokenizer itself adds one; Qwen's does not.

    Args:
        max_length: the longest text in tokens, usually `context_length(model)`; None for no limit.
        truncate: keep the first `max_length` tokens of a longer text instead of refusing it.
        chat: render each text (one user message, or a list of messages) with the tokenizer's chat template first; see
            `render`.

    Raises:
        InputError: no text, an empty text, a text longer than `max_length`, a text that is not Unicode, messages
            without `chat`, a chat template that is missing or has no thinking switch, or a tokenizer without character
            offsets.
    """
    if isinstance(texts, str):
        raise InputError("texts is a list of texts; put the one text into a list")
    if not texts:
        raise InputError("there is no text to tokenise")
    check_tokenizer(tokenizer)
    rendered = [render(tokenizer, text, chat, where=f"text {i}") for i, text in enumerate(texts)]
    rows, offsets, strings = [], [], []
    for i, text in enumerate(one.text for one in rendered):
        with foreign(f"the tokenizer fails on text {i}", InputError):
            # a chat template writes BOS itself where the model wants one
            encoded = tokenizer(text, add_special_tokens=chat is None, return_offsets_mapping=True, verbose=False)
        ids, spans = encoded["input_ids"], [tuple(span) for span in encoded["offset_mapping"]]
        if not ids:
            raise InputError(f"text {i} ({brief(text)}) has no token")
        cut = max_length is not None and len(ids) > max_length
        if cut and not truncate:
            raise InputError(
                f"text {i} has {len(ids)} tokens and the context holds {max_length}; shorten it or pass truncate=True"
                f" to keep its first {max_length}"
            )
        ids, spans = ids[:max_length], spans[:max_length]
        rows.append(ids)
        offsets.append(spans)
        strings.append(display(text, spans, tokenizer.convert_ids_to_tokens(ids), whole=not cut))
    input_ids, attention_mask = _pad(rows, _pad_id(tokenizer), padding_side)
    return Tokens(input_ids, attention_mask, [one.text for one in rendered], offsets, strings, rendered)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError for a tokenizer without character offsets."""
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__} gives no character offsets; a tokenizer.json is needed")


def token_ids(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], chat: Chat | None) -> list[list[int]]:
    """The ids of every document, the same as `tokenize` and `chunks` give.

    Raises:
        InputError: as `tokenize`.
    """
    if not documents:
        return []
    texts = [render_document(tokenizer, document, chat).text for document in documents]
    with foreign("the tokenizer fails on a text", InputError):
        found: Any = tokenizer(texts, add_special_tokens=chat is None, verbose=False)["input_ids"]
    return found


def render_document(tokenizer: PreTrainedTokenizerBase, document: Document, chat: Chat | None) -> Rendered:
    """A document as it will be tokenised; the tools that its row names go to the chat template."""
    tools = document.meta.get("tools") if chat is not None else None
    where = f"row {document.row} of {document.source}" if document.source else "the text"
    return render(
        tokenizer,
        document.text,
        chat,
        tools=tools if chat is not None and isinstance(tools, list) else None,
        where=where,
    )


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a tokenizer itself puts before every text, such as a BOS: rows begin with them.

    Found by tokenising, so it holds for `add_bos_token` and for post-processors alike.

    Raises:
        InputError: the tokenizer fails on a text of one letter.
    """
    call: Any = tokenizer
    with foreign("the tokenizer fails on the text 'a'", InputError):
        bare = list(call("a", add_special_tokens=False)["input_ids"])
        whole = list(call("a")["input_ids"])
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    return whole[: starts[0]] if bare and starts else []


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that a tokenizer calls special."""
    known: Any = tokenizer
    added = {i for i, token in known.added_tokens_decoder.items() if token.special}
    return frozenset({*known.all_special_ids, *added})


def display(
    text: str, spans: Sequence[tuple[int, int]], names: Sequence[str], *, whole: bool, shown: int = 0
) -> list[str]:
    """Display strings that join to the text from the character `shown` on.

    Characters that no token covers go to the next token if they are spaces, else (a combining accent) to the last one.
    """
    strings: list[str] = []
    for (start, end), name in zip(spans, names, strict=True):
        if start == end:
            strings.append(name)
            continue
        skipped = text[shown:start]
        if strings and skipped and not skipped.isspace():
            strings[-1] += skipped
            shown = start
        strings.append(text[shown:end])
        shown = max(shown, end)
    if whole and shown < len(text) and strings:  # trailing characters that no token covers
        last = max((i for i, (start, end) in enumerate(spans) if start != end), default=len(strings) - 1)
        strings[last] += text[shown:]
    return strings


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id of the vocabulary will do at padding: the mask hides it."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)


def _pad(rows: list[list[int]], pad: int, side: str) -> tuple[Tensor, Tensor]:
    if side not in ("left", "right"):
        raise InputError(f"padding_side is 'left' or 'right', not {side!r}")
    seq = max(map(len, rows))
    input_ids = torch.full((len(rows), seq), pad, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), seq), dtype=torch.int64)
    for i, ids in enumerate(rows):
        where = slice(seq - len(ids), seq) if side == "left" else slice(0, len(ids))
        input_ids[i, where] = torch.tensor(ids)
        attention_mask[i, where] = 1
    return input_ids, attention_mask


def by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of texts in batches of like length, each at most `budget` tokens with padding."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches and lengths[i] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def padded(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Rows of token ids as `input_ids` and `attention_mask`, padded on the right with zeros to the longest."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask

"""Packed rows begin with what the model expects, also in the middle of a document."""

from __future__ import annotations

from itertools import islice

import pytest
import tiny

from qwen_scope.errors import FormatError, InputError
from qwen_scope.text import Corpus, TokenRows, chunks, start_ids, tokenize

TEXTS = [f"document {i} " + "the " * (7 * i % 40) for i in range(30)]


def test_what_stands_before_a_text(tokenizer) -> None:
    assert start_ids(tokenizer) == []
    other = tiny.with_bos(tokenizer)
    assert start_ids(other) == [other.bos_token_id]


def test_every_row_begins_with_bos_and_the_rest_is_the_documents(tokenizer) -> None:
    other = tiny.with_bos(tokenizer)
    bos = other.bos_token_id
    rows = [row for batch in TokenRows(Corpus(TEXTS), other, context_length=16, batch_size=3) for row in batch.tolist()]
    assert all(row[0] == bos for row in rows)
    flat = [i for text in TEXTS for i in other(text)["input_ids"]]
    at = 0
    for row in rows:
        begins = flat[at] == bos
        assert begins or row[1:] == flat[at : at + 15], "a row in the middle of a document has BOS, then its tokens"
        assert not begins or row == flat[at : at + 16], "a row at the beginning of a document has BOS once"
        at += 16 if begins else 15
    assert len(flat) - at < 16


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_going_on_gives_the_same_rows(tokenizer, taken: int) -> None:
    other = tiny.with_bos(tokenizer)
    first = TokenRows(Corpus(TEXTS, repeat=True), other, context_length=16, batch_size=3)
    stream = iter(first)
    for _ in range(taken):
        next(stream)
    again = TokenRows(Corpus(TEXTS, repeat=True), other, context_length=16, batch_size=3)
    again.seek(first.cursor())
    assert [b.tolist() for b in islice(stream, 9)] == [b.tolist() for b in islice(again, 9)]


def test_a_place_of_an_earlier_version_and_rows_without_room_are_refused(tokenizer) -> None:
    rows = TokenRows(Corpus(TEXTS), tokenizer)
    with pytest.raises(FormatError, match="kept by an earlier version"):
        rows.seek({"epoch": 0, "document": 3, "offset": 0})
    for options in ({"context_length": 0}, {"batch_size": 0}, {"context_length": -1}):
        with pytest.raises(InputError, match="at least one row of one token"):
            TokenRows(Corpus(TEXTS), tokenizer, **options)
    with pytest.raises(InputError, match="at least one row of one token"):
        TokenRows(Corpus(TEXTS), tiny.with_bos(tokenizer), context_length=1)


def test_packing_chunks_and_batches_give_the_same_ids(tokenizer) -> None:
    texts = ["the 中 é", " leading", "a\r\nb", "x" * 3000]
    batch = tokenize(tokenizer, texts, max_length=None)
    end = tokenizer.eos_token_id
    flat = []
    for i, text in enumerate(texts):
        ids = [j for part in chunks(tokenizer, text) for j in part.ids]
        assert ids == batch.input_ids[i, : batch.lengths[i]].tolist()
        flat += [*ids, end]
    packed = [
        j
        for rows in TokenRows(Corpus(texts), tokenizer, context_length=10, batch_size=2)
        for j in rows.flatten().tolist()
    ]
    assert packed == flat[: len(packed)]

"""Objects as corpora: tables by their text column, never the names of columns or splits; and what is no corpus."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from qwen_scope.errors import InputError, NotFoundError, QwenScopeWarning
from qwen_scope.text import Corpus

TEXTS = [f"text {i} ü" for i in range(11)]
COLUMNS = {"id": list(range(11)), "text": TEXTS, "tag": [f"t{i}" for i in range(11)]}
ROWS = [{"id": i, "text": text, "tag": f"t{i}"} for i, text in enumerate(TEXTS)]


TABLES: dict[str, Callable[[], Any]] = {
    "pandas": lambda: pd.DataFrame(COLUMNS),
    "pandas with an index": lambda: pd.DataFrame(COLUMNS, index=[f"i{i}" for i in range(11)]),
    "polars": lambda: pl.DataFrame(COLUMNS),
    "arrow table": lambda: pa.table(COLUMNS),
    "arrow table in chunks": lambda: pa.concat_tables([pa.table(COLUMNS).slice(0, 4), pa.table(COLUMNS).slice(4)]),
    "arrow batch": lambda: pa.table(COLUMNS).to_batches()[0],
    "dataset": lambda: datasets.Dataset.from_dict(COLUMNS),
    "streamed dataset": lambda: datasets.Dataset.from_dict(COLUMNS).to_iterable_dataset(),
    "dictionary of datasets": lambda: datasets.DatasetDict(train=datasets.Dataset.from_dict(COLUMNS)),
    "columns": lambda: COLUMNS,
    "columns of arrays": lambda: {"id": np.arange(11), "text": np.array(TEXTS), "tag": COLUMNS["tag"]},
    "rows": lambda: ROWS,
    "rows from a generator": lambda: (row for row in ROWS),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_is_read_by_its_text_column_with_the_others_as_metadata(kind: str) -> None:
    found = list(Corpus(TABLES[kind]()))
    assert [document.text for document in found] == TEXTS
    assert [document.meta["tag"] for document in found] == COLUMNS["tag"]
    assert [int(document.meta["id"]) for document in found] == COLUMNS["id"]
    assert [document.row for document in found] == list(range(1, 12))


@pytest.mark.parametrize("kind", [kind for kind in TABLES if "generator" not in kind])
def test_reading_goes_on_from_any_row(kind: str) -> None:
    first = Corpus(TABLES[kind]())
    assert len(list(islice(first, 5))) == 5
    again = Corpus(TABLES[kind]())
    again.seek(first.cursor())
    assert [document.text for document in again] == TEXTS[5:]


SERIES: dict[str, Callable[[], Any]] = {
    "list": lambda: TEXTS,
    "tuple": lambda: tuple(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "series": lambda: pd.Series(TEXTS),
    "series of polars": lambda: pl.Series(TEXTS),
    "array": lambda: np.array(TEXTS),
    "arrow array": lambda: pa.array(TEXTS),
    "arrow chunks": lambda: pa.chunked_array([TEXTS[:3], TEXTS[3:]]),
}


@pytest.mark.parametrize("kind", SERIES)
def test_a_series_of_texts(kind: str) -> None:
    assert [document.text for document in Corpus(SERIES[kind]())] == TEXTS


@pytest.mark.parametrize("kind", [*TABLES])
def test_a_table_without_the_column_is_one_sentence(kind: str) -> None:
    with pytest.raises(InputError, match=r"no row of .* can be used: 11 missing column.*'text'.*pass column='"):
        list(Corpus(TABLES[kind](), column="body"))


@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        ({"text": "one text"}, InputError, "'text' holds str, where a mapping has a column"),
        ({"train": {"text": ["a"]}}, InputError, "'train' holds dict, where a mapping has a column"),
        (
            {"text": ["a", "b"], "id": [1]},
            InputError,
            "the columns of a mapping have one length: 'text' has 2, 'id' has 1",
        ),
        ({}, InputError, "the columns of a mapping have one length: there is none"),
        (datasets.DatasetDict(test=datasets.Dataset.from_dict(COLUMNS)), NotFoundError, "no split 'train'.*has 'test'"),
        ({"a", "b"}, InputError, "a set holds no documents in an order"),
        (frozenset("ab"), InputError, "a frozenset holds no documents"),
        (b"bytes", InputError, "a bytes holds no documents"),
        (3, InputError, "a int holds no documents"),
        (None, InputError, "a NoneType holds no documents"),
    ],
)
def test_what_holds_no_documents_is_refused(source: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        Corpus(source)


def test_a_split_is_chosen_and_never_its_name_taken_for_a_text(tmp_path: Any) -> None:
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": ["a"]}), test=datasets.Dataset.from_dict({"text": ["b", "c"]})
    )
    assert [document.text for document in Corpus(both, split="test")] == ["b", "c"]
    both.save_to_disk(tmp_path / "both")
    assert [document.text for document in Corpus(tmp_path / "both", split="test")] == ["b", "c"]
    with pytest.raises(NotFoundError, match="no split 'dev'"):
        Corpus(tmp_path / "both", split="dev")


def test_missing_values_of_a_frame_cost_their_row_alone() -> None:
    frame = pd.DataFrame({"text": ["a", None, float("nan"), "b"]})
    with pytest.warns(QwenScopeWarning, match="2 of 4 rows of table can't be used"):
        assert [document.text for document in Corpus(frame)] == ["a", "b"]


def test_a_generator_is_read_once() -> None:
    corpus = Corpus((text for text in TEXTS), repeat=True)
    assert not corpus.endless
    assert len(list(corpus)) == 11
    with pytest.raises(InputError, match="can be read only once"):
        Corpus((text for text in TEXTS), sample=3)


@pytest.mark.slow
def test_a_source_is_given_up_when_nothing_of_its_beginning_can_be_used() -> None:
    def rows() -> Any:
        while True:
            yield {"body": "x y"}

    with pytest.raises(InputError, match=r"none of the first 10,000 rows of list can be used.*pass column='body'"):
        list(Corpus(rows()))


def test_the_lab_has_its_factors_and_no_end_unless_a_sample_is_asked_for() -> None:
    assert Corpus("lab").endless
    found = list(Corpus("lab", sample=5, seed=3))
    assert len(found) == 5
    assert {"id", "kind", "language", "register"} <= set(found[0].meta)
    assert [d.text for d in islice(Corpus("lab", seed=3), 5)] == [d.text for d in found]


def test_messages_keep_their_tool_calls_and_lose_what_a_table_fills_in() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = [
        {"role": "user", "content": "1+1?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    (found,) = Corpus([{"text": talk, "tools": [{"name": "add"}]}])
    assert found.text == [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    assert found.meta == {"tools": [{"name": "add"}]}

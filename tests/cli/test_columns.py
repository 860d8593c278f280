"""A table without the column that was asked for: every command names the columns it has and the option to write."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen_scope.cli import main
from qwen_scope.errors import InputError
from qwen_scope.text import Corpus

ROWS = [
    {"id": "a7", "question": "What is 2 + 2?", "answer": "4"},
    {"id": "a8", "question": "And 3 + 3?", "answer": "6"},
]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("g.csv").write_text("id,question,answer\na7,What is 2 + 2?,4\n")
    Path("g.tsv").write_text("id\tquestion\tanswer\na7\tWhat is 2 + 2?\t4\n")
    pq.write_table(pa.Table.from_pylist(ROWS), "g.parquet")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["extract", "g.jsonl", "-o", "store"], "--column question"),
        (["extract", "g.csv", "-o", "store"], "--column question"),
        (["extract", "g.tsv", "-o", "store"], "--column question"),
        (["extract", "g.parquet", "-o", "store"], "--column question"),
        (["find", "--positive", "g.jsonl", "--negative", "g.csv"], "--column question"),
        (["classify", "fit", "g.jsonl", "g.csv"], "--column question"),
        (["train", "g.jsonl", "-o", "run", "--d-sae=64", "--k=4", "--tokens=4096"], "--column question"),
        (["posttrain", "prepare", "g.jsonl", "--target", "de", "-o", "t.json"], "--column question"),
        (["posttrain", "sft", "g.jsonl", "--method", "plain", "-o", "out"], "--column question"),
        (["posttrain", "repetition", "g.jsonl", "-o", "r.json"], "--column question"),
        (["posttrain", "rl", "g.jsonl", "--method", "vanilla", "--reward", "language", "-o", "o"], "--column question"),
        (["posttrain", "eval", "g.jsonl", "--script", "CJK"], "--prompt-column question"),
    ],
    ids=lambda x: " ".join(x[:3]) if isinstance(x, list) else None,
)
def test_a_missing_column_is_answered_with_those_there_are(words: list, option: str, capsys) -> None:
    assert main(words) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("qwen-scope: ")
    for name in ROWS[0]:
        assert name in err
    assert f"pass {option}" in err, err


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"q": "one", "long": "two words"}, ": its rows have no column 'text' but 'q', 'long'; pass column='long'"),
        ({"q": "one"}, ": its rows have no column 'text' but 'q'; pass column='q'"),
        ({"n": 3}, ": its rows have no column 'text' but 'n'"),
        ({}, ": its rows have no column 'text' but none"),
        ({"text": ""}, ""),
    ],
)
def test_the_column_that_looks_like_text_is_offered(row: dict, says: str) -> None:
    corpus = Corpus([row])
    with pytest.raises(InputError, match="no row of list can be used"):
        list(corpus)
    assert corpus.other_columns() == says


@pytest.mark.parametrize(
    ("piped", "read"),
    [("hello\n", "hello"), ("hello", "hello"), ("hello\r\n", "hello"), ("a\nb\n\n", "a\nb\n"), (" a ", " a ")],
)
def test_a_piped_text_loses_the_newline_that_ends_its_last_line(piped: str, read: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(piped))
    assert main(["features", "-", "--layers", "0", "--json", "--model", "lab"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == read

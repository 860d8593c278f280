"""Corpora from every kind of source: nothing is lost silently, and reading goes on from any row."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from qwen_scope import load_scope
from qwen_scope.errors import FormatError, InputError, NotFoundError, QwenScopeWarning
from qwen_scope.text import Corpus, Document, Unreadable

ROWS = [{"text": f'Text {i} äß你\nnext "line", with, commas', "n": i} for i in range(23)]


def write(folder: Path, kind: str, rows: list[dict] = ROWS) -> Path:
    """The rows as a file of a kind."""
    path = folder / f"corpus.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=5)
    elif kind.startswith(("csv", "tsv")):
        opener = gzip.open if kind.endswith("gz") else open
        with opener(path, "wt", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind.startswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    return path


KINDS = ["jsonl", "ndjson", "jsonl.gz", "csv", "csv.gz", "tsv", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_documents_and_goes_on_from_any_row(tmp_path, kind) -> None:
    path = write(tmp_path, kind)
    whole = list(Corpus(path))
    assert [d.text for d in whole] == [row["text"] for row in ROWS]
    assert [int(d.meta["n"]) for d in whole] == list(range(23))
    assert {d.source for d in whole} == {path.name}
    assert [d.row for d in whole] == list(range(1, 24))
    for taken in (0, 1, 4, 5, 22, 23):
        corpus = Corpus(path)
        rows = corpus.rows()
        first = [next(rows) for _ in range(taken)]
        again = Corpus(path)
        again.seek(json.loads(json.dumps(corpus.cursor())))
        assert first + list(again.rows()) == whole


@pytest.mark.parametrize("kind", [*KINDS, "list"])
def test_a_sample_is_fixed_even_and_in_order(tmp_path, kind) -> None:
    source = ROWS if kind == "list" else write(tmp_path, kind)
    whole = list(Corpus(source))
    found = list(Corpus(source, sample=7, seed=3))
    assert found == list(Corpus(source, sample=7, seed=3))
    assert len(found) == 7
    places = [whole.index(document) for document in found]
    assert places == sorted(places)
    assert found != list(Corpus(source, sample=7, seed=4))
    assert list(Corpus(source, sample=100)) == whole
    corpus = Corpus(source, sample=7, seed=3)
    rows = corpus.rows()
    first = [next(rows) for _ in range(3)]
    again = Corpus(source, sample=7, seed=3)
    again.seek(corpus.cursor())
    assert first + list(again.rows()) == found


def test_a_folder_is_read_in_the_order_of_names(tmp_path) -> None:
    (tmp_path / "b.txt").write_text("one\ntwo\n\n\nthree\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text('{"text": "zero"}\n')
    (tmp_path / "notes.md").write_text("not read")
    assert [(d.source, d.text) for d in Corpus(tmp_path)] == [
        ("a/x.jsonl", "zero"), ("b.txt", "one\ntwo"), ("b.txt", "three"),
    ]  # fmt: skip
    assert [d.text for d in Corpus(tmp_path / "b.txt", unit="line")] == ["one", "two", "three"]
    assert [d.text for d in Corpus(tmp_path / "b.txt", unit="file")] == ["one\ntwo\n\n\nthree"]
    for unit in ("paragraph", "line", "file"):
        whole = list(Corpus(tmp_path, unit=unit))
        corpus = Corpus(tmp_path, unit=unit)
        rows = corpus.rows()
        first = [next(rows), next(rows)]
        again = Corpus(tmp_path, unit=unit)
        again.seek(corpus.cursor())
        assert first + list(again.rows()) == whole
        assert again.progress == 1.0


def test_unreadable_rows_are_reported_with_their_place(tmp_path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "good"}', b"{not json", b'{"text": "\xff\xfe"}', b'{"body": "x"}', b"[1, 2]",
        b'{"text": 5}', b'{"text": ""}', b"", b'{"text": "\\ud800"}', b"[" * 100_000, b'{"text": null}',
        b'{"text": [{"role": "user"}]}', b'{"text": "last", "deep": ' + b"[" * 400 + b"]" * 400 + b', "x": NaN}',
    ]  # fmt: skip
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = list(Corpus(path).rows())
    good = [d for d in found if isinstance(d, Document)]
    assert [(d.text, d.row) for d in good] == [("good", 1), ("last", 13)]
    assert good[1].meta["x"] == "nan"
    bad = [(d.row, d.reason) for d in found if isinstance(d, Unreadable)]
    assert bad == [
        (2, "bad JSON"), (3, "invalid UTF-8"), (4, "missing column"), (5, "not text"), (6, "not text"), (7, "empty"),
        (9, "not Unicode"), (10, "bad JSON"), (11, "not text"), (12, "not text"),
    ]  # fmt: skip
    assert all(isinstance(d, Document) or d.detail for d in found)


def test_unreadable_records_of_csv_text_and_damaged_files(tmp_path) -> None:
    path = tmp_path / "c.csv"
    path.write_bytes(b'text,n\ngood,1\n\xff,2\ntoo,many,3\nfew\n"a ""quoted"" one",4\n"never closed,5\n')
    found = list(Corpus(path).rows())
    assert [d.text for d in found if isinstance(d, Document)] == ["good", 'a "quoted" one']
    bad = [(d.row, d.reason) for d in found if isinstance(d, Unreadable)]
    assert bad == [(2, "invalid UTF-8"), (3, "bad CSV"), (4, "bad CSV"), (6, "bad CSV")]
    (tmp_path / "c.txt").write_bytes(b"good\n\n\xff\xff\n\ngood too")
    found = list(Corpus(tmp_path / "c.txt").rows())
    assert [getattr(d, "reason", "") for d in found] == ["", "invalid UTF-8", ""]
    whole = gzip.compress("\n".join(json.dumps(row) for row in ROWS * 200).encode())
    (tmp_path / "c.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found = list(Corpus(tmp_path / "c.jsonl.gz").rows())
    assert isinstance(found[-1], Unreadable)
    assert found[-1].reason in ("damaged file", "bad JSON")
    assert len(found) > 10
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(FormatError, match="not a Parquet file"):
        Corpus(tmp_path / "c.parquet")


def test_ten_megabytes_in_one_line(tmp_path) -> None:
    long = "word " * 2_000_000
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": long}) + '\n{"text": "after"}\n')
    (tmp_path / "c.csv").write_text(f'text\n"{long}"\nafter\n')
    (tmp_path / "c.txt").write_text(long + "\n\nafter\n")
    for kind in ("jsonl", "csv", "txt"):
        texts = [d.text for d in Corpus(tmp_path / f"c.{kind}")]
        assert [len(texts[0]), texts[1]] == [10_000_000, "after"]


def test_rows_that_can_not_be_used_are_counted_over_all_parts_of_a_reading(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join('{"text": "x"}\n' if i % 3 else "no\n" for i in range(20)))
    first = Corpus(path)
    for _ in islice(first, 5):
        pass
    again = Corpus(path)
    again.seek(json.loads(json.dumps(first.cursor())))
    with pytest.warns(QwenScopeWarning, match="7 of 20 rows of a.jsonl can't be used"):
        rest = list(again)
    assert (len(rest), again.used, again.unused) == (8, 13, {"bad JSON": 7})


def test_metadata_survives_as_json(tmp_path) -> None:
    rows = [
        {"text": "x", "when": datetime.datetime(2026, 1, 2), "raw": b"\x00", "tags": [{"a": 1, "b": None}], "on": True}
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    meta = next(iter(Corpus(tmp_path / "c.parquet"))).meta
    assert json.loads(json.dumps(meta)) == meta
    assert (meta["when"], meta["tags"], meta["on"]) == ("2026-01-02 00:00:00", [{"a": 1, "b": None}], True)


def test_datasets_from_disk_in_memory_and_streamed(tmp_path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_list(ROWS)
    assert [d.text for d in Corpus(dataset, name="mine")] == [row["text"] for row in ROWS]
    dataset.save_to_disk(tmp_path / "saved")
    corpus = Corpus(tmp_path / "saved")
    rows = corpus.rows()
    first = [next(rows) for _ in range(4)]
    again = Corpus(tmp_path / "saved")
    again.seek(corpus.cursor())
    assert [d.meta["n"] for d in [*first, *again.rows()]] == list(range(23))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: dataset.to_iterable_dataset())
    hub = Corpus("owner/name", split="train")
    assert (hub.name, hub.progress) == ("owner/name", None)
    assert [d.row for d in hub] == list(range(1, 24))
    with pytest.raises(InputError, match="no known size"):
        Corpus("owner/name", sample=3)


def test_stores_among_documents_are_no_documents(tmp_path) -> None:
    """Their token texts would be read as documents of one token each."""
    (tmp_path / "notes.txt").write_text("One.\n\nTwo.\n")
    (tmp_path / "documents").mkdir()
    table = pa.table({"text": ["Three."]})
    pq.write_table(table, tmp_path / "documents" / "000000.parquet")  # of such a name, but in no store
    load_scope("lab", device="cpu").extract(["Eins. Zwei."], tmp_path / "out" / "store").close()
    assert len(list((tmp_path / "out").rglob("*.parquet"))) > 5
    assert [d.text for d in Corpus(tmp_path)] == ["Three.", "One.", "Two."]
    there = MemoryFileSystem()
    there.put(f"{tmp_path}/", "/documents-and-a-store/", recursive=True)
    assert [d.text for d in Corpus("memory://documents-and-a-store")] == ["Three.", "One.", "Two."]
    for whole in (tmp_path / "out" / "store", "memory://documents-and-a-store/out/store"):
        with pytest.raises(InputError, match="is a store of features; name the documents it was made of"):
            Corpus(whole)
    (tmp_path / "out" / "store" / "manifest.json").unlink()  # as while it is written
    assert len(list(Corpus(tmp_path))) == 3


def test_what_is_no_corpus(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "c.pdf").write_text("x")
    for source, kind, sentence in (
        (tmp_path / "nowhere.jsonl", NotFoundError, "no file, folder or dataset"),
        ("./owner/name", NotFoundError, "no file, folder or dataset"),
        (tmp_path / "empty", InputError, "holds no file that ends with .txt"),
        (tmp_path / "c.pdf", InputError, "is no corpus this package reads"),
    ):
        with pytest.raises(kind, match=sentence):
            Corpus(source)
    with pytest.raises(InputError, match="paragraph, line, file, not 'page'"):
        Corpus(["x"], unit="page")
    with pytest.raises(InputError, match="at least one row"):
        Corpus(["x"], sample=0)

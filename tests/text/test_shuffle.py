"""Shuffled reading: every document once, sources in proportion, files from end to end, and resumed to the same rest."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import kstest, spearmanr

from qwen_scope import load_scope
from qwen_scope.errors import FormatError, InputError
from qwen_scope.text import Corpus, Document, Together, TokenRows
from qwen_scope.text import corpus as corpus_file
from qwen_scope.train import TrainConfig, TrainRun
from qwen_scope.train.run import corpus_of


def jsonl(path: Path, n: int, name: str = "a", blank: bool = False) -> Path:
    gap = "\n" if blank else ""
    data = "".join(json.dumps({"text": f"{name} {i}"}) + "\n" + (gap if i % 3 else "") for i in range(n)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def texts(corpus: Corpus) -> list[str]:
    return [str(one.text) for one in corpus]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 50 documents, so that a few thousand are many."""
    monkeypatch.setattr(corpus_file, "BLOCK", 50)


def made(folder: Path, kind: str, n: int) -> object:
    """A source of `n` documents of a kind."""
    path = folder / f"corpus.{kind}"
    rows = [f"a {i}" for i in range(n)]
    if kind in ("jsonl", "jsonl.gz"):
        return jsonl(path, n, blank=True)
    if kind == "csv":
        path.write_text("text\n" + "".join(f'"a {i}"\n' for i in range(n)))
    elif kind == "txt":
        path.write_text("".join(f"a {i}\n\n\n" for i in range(n)))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": rows}), path, row_group_size=77)
    elif kind == "list":
        return rows
    elif kind == "files":
        for i in range(n):
            (folder / f"{i:04}.txt").write_text(f"a {i}")
        return folder
    return path


KINDS = ("jsonl", "jsonl.gz", "csv", "txt", "parquet", "list", "files")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("small_blocks")
def test_every_document_once_by_seed_and_the_same_rest_from_anywhere(tmp_path: Path, kind: str) -> None:
    source = made(tmp_path, kind, 300)
    whole = texts(Corpus(source, shuffle=1))
    assert sorted(whole) == sorted(texts(Corpus(source)))
    assert whole != texts(Corpus(source))
    assert whole == texts(Corpus(source, shuffle=1))
    assert whole != texts(Corpus(source, shuffle=2))
    for taken in (0, 1, 49, 50, 51, 299, 300, 430):
        first = Corpus(source, shuffle=1, repeat=True)
        before = [one.text for one in islice(first, taken)]
        again = Corpus(source, shuffle=1, repeat=True)
        again.seek(json.loads(json.dumps(first.cursor())))
        two_passes = before + [one.text for one in islice(again, 600 - taken)]
        assert two_passes[:300] == whole
        assert sorted(map(str, two_passes[300:])) == sorted(whole)
        assert two_passes[300:] != whole  # every pass has an order of its own


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_sources_come_in_proportion_to_their_rows_from_the_first_to_the_last(tmp_path: Path) -> None:
    sizes = {"a": 2000, "b": 500, "c": 100, "d": 7}
    files = [str(jsonl(tmp_path / f"{name}.jsonl", n, name)) for name, n in sizes.items()]
    found = [one.split()[0] for one in texts(Corpus(Together(tuple(files)), shuffle=0))]
    assert Counter(found) == sizes
    seen = Counter[str]()
    total = sum(sizes.values())
    for n, name in enumerate(found, 1):
        seen[name] += 1
        for one, size in sizes.items():
            # A block of 50, and one row of each strand, of which a source has about 64 times its share.
            assert abs(seen[one] - n * size / total) <= 50 + 64 * size / total + 1
    for name, size in sizes.items():  # ranks of a source's documents are uniform over the run
        ranks = [(i + 0.5) / total for i, one in enumerate(found) if one == name]
        assert kstest(ranks, "uniform").pvalue > 0.01, (name, size)
    in_order = [one.split()[0] for one in texts(Corpus(Together(tuple(files))))]
    assert kstest([i / total for i, one in enumerate(in_order) if one == "b"], "uniform").pvalue < 1e-6


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt", "parquet", "files"])
@pytest.mark.usefixtures("small_blocks")
def test_rows_of_one_file_are_mixed_from_end_to_end(tmp_path: Path, kind: str) -> None:
    """Not only within a block: any tenth of the order has rows from all tenths of the file."""
    n = 2000
    order = [int(one.split()[1]) for one in texts(Corpus(made(tmp_path, kind, n), shuffle=0))]
    assert abs(spearmanr(range(n), order)[0]) < 0.1
    for start in range(0, n, 200):
        tenths = Counter(row // 200 for row in order[start : start + 200])
        assert min(tenths[i] for i in range(10)) >= 8  # of 20 on average


@pytest.mark.usefixtures("small_blocks")
def test_a_zipped_file_is_mixed_within_blocks_alone(tmp_path: Path) -> None:
    order = [int(one.split()[1]) for one in texts(Corpus(made(tmp_path, "jsonl.gz", 500), shuffle=0))]
    assert all(abs(place - row) < 50 for place, row in enumerate(order))
    assert order != sorted(order)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "files", "together"])
@pytest.mark.usefixtures("small_blocks")
def test_what_is_held_out_and_shared_is_what_it_is_in_order(tmp_path: Path, kind: str) -> None:
    if kind == "together":
        a = jsonl(tmp_path / "a.jsonl", 211, "a", blank=True)
        b = jsonl(tmp_path / "b.jsonl.gz", 57, "b")
        source: object = Together((str(a), str(b)))
    else:
        source = made(tmp_path, kind, 300)

    def read(**more: object) -> list[str]:
        return texts(Corpus(source, hold_out=10, **more))  # type: ignore[arg-type]

    kept = read(held_out=True, shuffle=3)
    assert sorted(kept) == sorted(read(held_out=True))
    learnt = read(shuffle=3)
    assert sorted(kept + learnt) == sorted(texts(Corpus(source)))
    shares = [read(shuffle=3, rank=rank, world=3) for rank in range(3)]
    assert sorted(one for share in shares for one in share) == sorted(learnt)
    assert [sorted(share) for share in shares] == [sorted(read(rank=rank, world=3)) for rank in range(3)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    sampled = texts(Corpus(source, sample=40, seed=5, shuffle=3))
    assert sorted(sampled) == sorted(texts(Corpus(source, sample=40, seed=5)))


@pytest.mark.slow
def test_a_short_corpus_is_one_permutation(tmp_path: Path) -> None:
    """Below one block every order is possible: over seeds a row's place is uniform."""
    source = [str(i) for i in range(20)]
    places = [texts(Corpus(source, shuffle=seed)).index("3") for seed in range(400)]
    assert kstest([(place + 0.5) / 20 for place in places], "uniform").pvalue > 0.01


@pytest.mark.usefixtures("small_blocks")
def test_streams_are_mixed_within_blocks_and_take_turns_with_others(tmp_path: Path) -> None:
    whole = texts(Corpus((f"x {i}" for i in range(120)), shuffle=0))
    assert sorted(whole) == sorted(f"x {i}" for i in range(120))
    assert all(abs(place - int(one.split()[1])) < 50 for place, one in enumerate(whole))
    a = jsonl(tmp_path / "a.jsonl", 100, "a")
    both = Together((str(a), "lab:language=de"))
    found = list(islice(Corpus(both, shuffle=0, hold_out=10), 180))
    assert Counter(one.source == "a.jsonl" for one in found[:100]) == {True: 50, False: 50}
    held = list(islice(Corpus(both, shuffle=0, hold_out=10, held_out=True), 20))
    assert sorted(one.row for one in held if one.source == "a.jsonl") == list(range(1, 101, 10))
    assert {one.row % 10 for one in held if one.source != "a.jsonl"} == {0}
    in_order = Corpus(Together((str(a), "lab:language=de")), hold_out=10, held_out=True)
    assert {(one.source, one.row) for one in held} == {(one.source, one.row) for one in islice(in_order, 20)}


@pytest.mark.slow
def test_a_file_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_file, "BLOCK_CHARACTERS", 2**18)
    path = tmp_path / "large.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " + "x" * 8000}) + "\n" for i in range(2500)))
    tracemalloc.start()
    count = sum(1 for _ in Corpus(path, shuffle=0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2500
    assert path.stat().st_size > 20e6
    assert peak < 5e6


def test_rows_that_can_not_be_used_are_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join('{"text": "x"}\n' if i % 3 else "no\n" for i in range(20)))
    corpus = Corpus(path, shuffle=0, quiet=True)
    rows = list(corpus.rows())
    assert (len(rows), sum(isinstance(one, Document) for one in rows)) == (20, 13)
    assert corpus.unused == {"bad JSON": 7}


def test_a_place_in_another_order_and_bad_seeds_and_names(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", 30)
    in_order, shuffled = Corpus(path), Corpus(path, shuffle=0)
    assert next(iter(in_order)) is not next(iter(shuffled))
    with pytest.raises(FormatError, match="kept while it was read in order, and here it is read shuffled"):
        Corpus(path, shuffle=0).seek(in_order.cursor())
    with pytest.raises(FormatError, match="kept while it was read shuffled, and here it is read in order"):
        Corpus(path).seek(shuffled.cursor())
    with pytest.raises(InputError, match="shuffle"):
        Corpus(path, shuffle=-1)
    with pytest.raises(InputError, match="name each source of documents once"):
        Together((str(path), str(path)))


def test_empty_files_and_an_empty_corpus(tmp_path: Path) -> None:
    for name in ("a", "c"):
        (tmp_path / f"{name}.jsonl").write_text("")
    jsonl(tmp_path / "b.jsonl", 5)
    assert sorted(texts(Corpus(tmp_path, shuffle=0))) == [f"a {i}" for i in range(5)]
    assert texts(Corpus(tmp_path / "a.jsonl", shuffle=0, repeat=True)) == []


def long_and_short(folder: Path) -> Path:
    """200 short documents around one that is as long as all of them, and a conversation."""
    rows: list[object] = [f"short {i} " + "word " * 20 for i in range(200)]
    rows.insert(70, "".join(f"line {i} of the long one\n" for i in range(1000)))
    rows.insert(30, [{"role": "user", "content": "said " * 200}])
    path = folder / "both.jsonl"
    path.write_text("".join(json.dumps({"text": row, "n": i}) + "\n" for i, row in enumerate(rows)))
    return path


def test_long_texts_are_cut_behind_lines_and_mixed_with_the_others(tmp_path: Path) -> None:
    path = long_and_short(tmp_path)
    whole = next(one for one in Corpus(path) if one.row == 72)
    corpus = Corpus(path, shuffle=0, longest=500)
    found = list(corpus)
    parts = [one for one in found if one.row == 72]
    assert [one.part for one in sorted(parts, key=lambda one: one.part)] == list(range(len(parts)))
    assert "".join(str(one.text) for one in sorted(parts, key=lambda one: one.part)) == whole.text
    assert all(
        250 < len(one.text) <= 500 and str(one.text).endswith("\n") for one in parts if one.part < len(parts) - 1
    )
    assert {one.meta["n"] for one in parts} == {71}
    assert corpus.used == 202  # documents, not parts
    others = [one for one in found if one.row != 72]
    assert sorted(one.row for one in others) == [i for i in range(1, 203) if i != 72]
    assert isinstance(next(one for one in others if one.row == 31).text, list)
    at = [(i + 0.5) / len(found) for i, one in enumerate(found) if one.row == 72]
    assert kstest(at, "uniform").pvalue > 0.01
    uncut = texts(Corpus(path, shuffle=0))
    assert uncut == texts(Corpus(path, shuffle=0, longest=10**6))  # in the same order where nothing is longer


def test_texts_without_lines_or_spaces_are_cut_at_the_length() -> None:
    cut = [str(one.text) for one in Corpus(["字" * 1001, "a " * 40], shuffle=0, longest=100)]
    assert sorted(map(len, cut)) == [1, 80, *[100] * 10]
    assert sorted(len(str(one.text)) for one in Corpus(["a " * 80], shuffle=0, longest=101)) == [60, 100]


@pytest.mark.usefixtures("small_blocks")
def test_reading_of_cut_texts_goes_on_from_anywhere_and_with_no_other_length(tmp_path: Path) -> None:
    path = long_and_short(tmp_path)
    whole = [(one.row, one.part) for one in Corpus(path, shuffle=1, longest=500)]
    for taken in (0, 1, 60, 110, len(whole) - 1):
        first = Corpus(path, shuffle=1, longest=500)
        before = [(one.row, one.part) for one in islice(first, taken)]
        kept = json.loads(json.dumps(first.cursor()))
        again = Corpus(path, shuffle=1, longest=500)
        again.seek(kept)
        assert before + [(one.row, one.part) for one in again] == whole
        assert again.used == 202
    for other in (None, 600):
        with pytest.raises(FormatError, match=f"were cut at 500 characters, here at {other}"):
            Corpus(path, shuffle=1, longest=other).seek(kept)
    del kept["longest"]  # as an earlier version kept it
    with pytest.raises(FormatError, match="were cut at None characters, here at 500"):
        Corpus(path, shuffle=1, longest=500).seek(kept)


def test_no_batch_of_a_run_is_of_one_long_text_alone(tmp_path: Path) -> None:
    """What `train` reads: no fifth of the rows is of a text alone that has half of the tokens."""
    tokenizer = load_scope("lab", device="cpu").tokenizer
    path = long_and_short(tmp_path)
    config = TrainConfig(d_sae=64, k=4, tokens=4096)
    run = TrainRun(str(path), tmp_path / "out", train=config, context_length=32, eval_tokens=0, hold_out=0)
    rows = torch.cat(list(TokenRows(corpus_of(run), tokenizer, context_length=32, batch_size=1, chat="default")))
    long = torch.tensor(["long" in str(tokenizer.decode(row)) for row in rows], dtype=torch.float)
    assert 0.3 < long.mean() < 0.7
    for part in long.split(-(-len(long) // 5)):
        assert 0.05 < part.mean() < 0.95

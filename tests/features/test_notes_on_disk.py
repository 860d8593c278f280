"""Notes, rounds and exports on a disk that is full, under writers that die, and beside other writers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import lab_store
import numpy as np
import pytest
from full_disk import full_after
from lab_store import LAYER

from qwen_scope import FeatureStore
from qwen_scope.cli import main
from qwen_scope.errors import FormatError, InputError, QwenScopeWarning
from qwen_scope.features import Notes
from qwen_scope.files import lock_folder
from qwen_scope.posttrain.journal import Attempt, Journal

ODD = ["a\u2028b", "c\u0085d", "e\x0bf\x0cg", "h\x1ci\x1dj\x1e", "k\u2029", "\r", "\ud7ff\U0001f600"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeatureStore]:
    with FeatureStore(lab_store.copied(tmp_path)) as opened:
        yield opened


def busy(store: FeatureStore, n: int) -> str:
    """Features that fire in about half of the documents."""
    documents = store.stats(LAYER)["documents"].to_numpy()
    order = np.argsort(np.abs(documents - store.manifest.documents // 2), kind="stable")
    return ",".join(f"{LAYER}/{feature}" for feature in order[:n].tolist())


@pytest.mark.slow
def test_a_full_disk_during_label_costs_no_label_and_no_store(store: FeatureStore, capsys, monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    path = store.folder / "notes.jsonl"
    few = ["--examples", "6", "--tests", "6"]
    words = ["label", str(store.folder), *few, "-f"]
    assert main([*words, busy(store, 1)]) == 0
    words.append(busy(store, 3))
    with full_after(path.stat().st_size + 100):
        assert main(words) == 2
    assert "can't write" in capsys.readouterr().err
    before = path.read_bytes()
    assert before.endswith(b"}\n")
    assert before.count(b"\n") == len(Notes(store)) == 1
    assert main(["show", str(store.folder), "--layer", str(LAYER), "-f", "3", "--no-model"]) == 0
    assert main(words) == 0
    assert path.read_bytes().startswith(before)
    assert [note.kind for note in Notes(store)] == ["label", "measure", "label", "label"]  # show keeps what it measured


@pytest.mark.parametrize("left", [1, 7, 60, 200])
def test_half_a_line_is_left_out_said_and_mended(store: FeatureStore, left: int, capsys) -> None:
    notes = Notes(store)
    notes.write(LAYER, 3, "the first")
    notes.write(LAYER, 3, "the second")
    path = store.folder / "notes.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n") + 1 + left])
    with pytest.warns(QwenScopeWarning, match=r"the last line of .*notes\.jsonl is torn"):
        torn = Notes(store)
    assert [note.body["text"] for note in torn] == ["the first"]
    torn.write(LAYER, 3, "the third")
    assert [note.body["text"] for note in Notes(store)] == ["the first", "the third"]
    assert main(["find", str(store.folder), "--label", "third"]) == 0
    assert "the third" in capsys.readouterr().out


def test_a_broken_line_in_the_middle_is_still_damage(store: FeatureStore) -> None:
    Notes(store).write(LAYER, 3, "the first")
    path = store.folder / "notes.jsonl"
    path.write_bytes(path.read_bytes()[:-20] + b"\n" + path.read_bytes())
    with pytest.raises(FormatError, match="line 1 of"):
        Notes(store)


@pytest.mark.parametrize("text", ODD)
def test_separators_inside_a_text_end_no_line(store: FeatureStore, tmp_path: Path, text: str) -> None:
    Notes(store).write(LAYER, 3, f"x{text}x", author=f"y{text}y")
    Notes(store).export(tmp_path / "out.jsonl")
    assert [note.body["text"] for note in Notes(store)] == [f"x{text}x"]
    assert Notes(store).merge(tmp_path / "out.jsonl") == 0
    # As another program writes it: not escaped.
    data = json.loads((tmp_path / "out.jsonl").read_text())
    (tmp_path / "raw.jsonl").write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8", newline="")
    assert Notes(store).merge(tmp_path / "raw.jsonl") == 0
    journal = Journal(tmp_path / "rounds")
    made = [Attempt(0, 3, 1, "kept", text, 0.5, ((0, 3, 0.5),)), Attempt(0, 3, 2, "failed", problem=text)]
    journal.seal(0, made)
    assert Journal(tmp_path / "rounds").rounds == [made]


def test_one_label_run_at_a_time_but_a_note_goes_beside_it(store: FeatureStore, capsys) -> None:
    words = ["label", str(store.folder), "-f", f"{LAYER}/3", "--summary"]
    with lock_folder(store.folder):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert main([*words[:-1], "--note", "seen meanwhile"]) == 0
    assert f"another process (process {os.getpid()}) is writing to" in said
    assert said.count("\n") == 1
    assert len(Notes(store)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "more"), [("delphi", ["--context", "64"]), ("neuronpedia", ["--model-id", "x", "--layers", str(LAYER)])]
)
def test_an_export_is_whole_or_absent(store: FeatureStore, tmp_path: Path, to: str, more: list[str], capsys) -> None:
    out = tmp_path / "new" / "out"
    words = ["export", str(store.folder), "--to", to, "-o", str(out), *more]
    words += ["--features", busy(store, 4), "--no-model"] if to == "neuronpedia" else []
    with full_after(100):
        assert main(words) == 2
    assert not (tmp_path / "new").exists()
    capsys.readouterr()
    with lock_folder(out.with_name(".unfinished-out")):
        assert main(words) == 2
    assert "is writing to" in capsys.readouterr().err
    assert main([*words[:5], str(store.folder / "inside"), *words[6:]]) == 2
    assert "which is read" in capsys.readouterr().err
    assert main(words) == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert main(words) == 2
    assert "is not empty" in capsys.readouterr().err


def test_statistics_keep_the_old_table(store: FeatureStore, tmp_path: Path) -> None:
    words = ["export", str(store.folder), "--to", "statistics", "-o", str(tmp_path / "s.csv")]
    assert main(words) == 0
    before = (tmp_path / "s.csv").read_bytes()
    with full_after(1000):
        assert main(words) == 2
    assert (tmp_path / "s.csv").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.csv", "store"]


def test_label_export_leaves_alone_what_it_reads(store: FeatureStore, tmp_path: Path, capsys) -> None:
    Notes(store).write(LAYER, 3, "a note")
    Notes(store).export(tmp_path / "theirs.jsonl")
    for name, said in (("store/out.jsonl", "which is read"), ("theirs.jsonl", "is what is read"), ("", "is a folder")):
        words = ["label", str(store.folder), "--merge", str(tmp_path / "theirs.jsonl")]
        assert main([*words, "--export", str(tmp_path / name)]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(InputError, match="it exists"):
        Notes(store).export(tmp_path / "theirs.jsonl")

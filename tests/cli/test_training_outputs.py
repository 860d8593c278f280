"""The commands that train, prepare or write data never write over what they read, and say so before a model opens."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qwen_scope.cli import main
from qwen_scope.errors import InputError
from qwen_scope.files import check_folder, lock_folder

NOWHERE = ["--model", "no/such/model", "--sae", "no/such/sae"]
"""A run that gets as far as the model ends in another sentence."""


@pytest.fixture
def given(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"text {i}", "prompt": f"hello {i}", "completion": "hi", "group": "ab"[i % 2]} for i in range(6)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("c.json", "c.jsonl", "on.json", "run/log.jsonl", "run/model/c.jsonl", "run/kept.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(lines)
    Path("soft.json").symlink_to("c.jsonl")
    os.link("c.jsonl", "hard.json")
    Path("linked").mkdir()
    Path("linked/log.jsonl").symlink_to("../c.jsonl")
    return tmp_path


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ONE_FILE = [
    (["prepare", "c.json", "--target", "a"], "c.json", "is what is read"),
    (["prepare", "c.jsonl", "--target", "a"], "soft.json", "is what is read"),
    (["prepare", "c.jsonl", "--target", "a"], "hard.json", "is what is read"),
    (["prepare", "c.jsonl", "--target", "a", "--onsets", "on.json", "--script", "CJK"], "on.json", "is what is read"),
    (["prepare", "run", "--target", "a"], "run/new.json", "which is read"),
    (["prepare", "c.jsonl", "--target", "a"], "table.txt", "has to end in .json"),
    (["prepare", "c.jsonl", "--target", "a"], "c.jsonl/t.json", "can't write"),
    (["repetition", "c.json"], "c.json", "is what is read"),
    (["repetition", "c.jsonl"], "soft.json", "is what is read"),
    (["repetition", "c.jsonl", "--looping", "on.json"], "on.json", "is what is read"),
    (["repetition", "c.jsonl"], "recipe.toml", "has to end in .json or .yaml"),
    (["repetition", "c.jsonl"], "c.jsonl/r.json", "can't write"),
]
FOLDERS = [
    (["posttrain", "sft", "run/log.jsonl"], "run", "is what is read"),
    (["posttrain", "sft", "run/model/c.jsonl"], "run", "lies in run/model"),
    (["posttrain", "sft", "c.jsonl"], "linked", "is what is read"),
    (["posttrain", "sft", "c.jsonl", "--held-out", "run/log.jsonl"], "run", "is what is read"),
    (["posttrain", "sft", "c.jsonl", "--monitor", "run/log.jsonl"], "run", "is what is read"),
    (["posttrain", "sft", "c.jsonl", "--table", "run/model/c.jsonl"], "run", "lies in run/model"),
    (["posttrain", "sft", "run"], "run/out", "which is read"),
    (["posttrain", "sft", "c.jsonl"], "c.jsonl", "is a file; name a folder"),
    (["posttrain", "sft", "c.jsonl"], "c.jsonl/out", "can't be written"),
    (["posttrain", "rl", "run/log.jsonl"], "run", "is what is read"),
    (["posttrain", "rl", "c.jsonl"], "linked", "is what is read"),
    (["posttrain", "rl", "c.jsonl", "--held-out", "run/log.jsonl"], "run", "is what is read"),
    (["posttrain", "rl", "c.jsonl"], "on.json", "is a file; name a folder"),
    (["synthesize", "run/kept.jsonl", "--store", "run", "-f", "3"], "run/out", "which is read"),
    (["synthesize", "run", "--store", "s", "-f", "3"], "run/out", "which is read"),
    (["synthesize", "c.jsonl", "--store", "s", "-f", "3"], "c.jsonl", "can't write c.jsonl/run.json"),
    (["synthesize", "c.jsonl", "--store", "s", "-f", "3"], "c.jsonl/out", "can't write"),
]


@pytest.mark.parametrize(("words", "out", "said"), ONE_FILE)
def test_a_file_that_is_read_stays(given: Path, capsys, words: list[str], out: str, said: str) -> None:
    refused(given, capsys, ["posttrain", *words, "-o", out, *NOWHERE], said)


@pytest.mark.parametrize(("words", "out", "said"), FOLDERS)
def test_a_folder_of_a_run_writes_over_nothing_that_is_read(given: Path, capsys, words, out: str, said: str) -> None:
    refused(given, capsys, [*words, "-o", out, *NOWHERE], said)


@pytest.mark.parametrize(
    ("data", "out", "said"),
    [
        ("run/metrics.jsonl", "run", "is what is read"),
        ("run/G/x.jsonl", "run", "lies in run/G"),
        ("run", "run/again", "which is read"),
        ("c.jsonl", "c.jsonl", "is a file; name a folder"),
    ],
)
def test_training_writes_over_nothing_that_is_read(given: Path, capsys, data: str, out: str, said: str) -> None:
    (given / "run" / "G").mkdir()
    for name in ("metrics.jsonl", "G/x.jsonl"):
        (given / "run" / name).write_text('{"text": "a"}\n')
    words = ["train", data, "--model", "no/such/model", "-o", out, "--group", "G", "--d-sae", "8", "--k", "2"]
    refused(given, capsys, [*words, "--tokens", "4096"], said)


def refused(folder: Path, capsys, words: list[str], said: str) -> None:
    before = everything(folder)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert everything(folder) == before


def test_other_inputs_may_lie_in_the_folder_of_a_run(given: Path) -> None:
    check_folder("run", ("run.json", "log.jsonl", "model"), "run/kept.jsonl", "c.jsonl", "no/such/model", "lab")
    check_folder("new/run", ("run.json",), "c.jsonl")
    assert not Path("new").exists()
    with pytest.raises(InputError, match="is what is read"):
        check_folder("run", ("run.json", "log.jsonl"), "run/kept.jsonl", "run/../run/log.jsonl")


def test_examples_take_a_folder_that_nobody_else_writes(tmp_path: Path, capsys) -> None:
    with lock_folder(tmp_path / "held"):
        assert main(["lab", "examples", "-o", str(tmp_path / "held")]) == 2
        assert "is writing to" in capsys.readouterr().err
    assert not (tmp_path / "held").exists()
    assert main(["lab", "examples", "-o", str(tmp_path / "held"), "--json"]) == 0
    names = json.loads(capsys.readouterr().out)["files"]
    assert sorted(path.name for path in (tmp_path / "held").iterdir()) == sorted(names)
    (tmp_path / "file").write_text("mine")
    assert main(["lab", "examples", "-o", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err

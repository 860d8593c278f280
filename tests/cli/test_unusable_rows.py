"""Rows that cannot be used are counted, said once and passed over, by every command that reads documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from qwen_scope.cli import main

BAD = [
    b'{"text": ""}',
    b'{"text": null}',
    b'{"text": 5}',
    b'{"text": ["a", 1]}',
    b'{"text": {"a": {}}}',
    b'{"text": "\\ud800"}',
    b'{"text": "\xff"}',
    b"{broken",
    b"[" * 50_000,
    b'{"text": ' + b"9" * 4301 + b"}",
    b'{"other": "x"}',
    b"17",
]
GOOD = [b'{"text": "Where is the station %d?"}' % i for i in range(8)]
OPTIONS = ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae")]


def corpus(path: Path, *rows: bytes) -> str:
    path.write_bytes(b"\n".join(rows))
    return str(path)


@pytest.fixture
def rule(tmp_path: Path) -> str:
    good = [str(tmp_path / f"{name}.txt") for name in ("a", "b")]
    for name, text in zip(good, ("station\n\n", "Morgen\n\n"), strict=True):
        Path(name).write_text(text * 6)
    assert main(["classify", "fit", *good, *OPTIONS, "-r", str(tmp_path / "rule.json")]) == 0
    return str(tmp_path / "rule.json")


def commands(source: str, other: str, rule: str, folder: Path) -> dict[str, list[str]]:
    return {
        "predict": ["classify", "predict", rule, source, *OPTIONS, "-o", str(folder / "p.jsonl")],
        "fit": ["classify", "fit", source, other, *OPTIONS, "-r", str(folder / "r.json")],
        "find": ["find", "--positive", source, "--negative", other, *OPTIONS, "--layer", "0"],
        "train": [
            "train", source, "--model", OPTIONS[1], "--layers", "0", "--d-sae", "64", "--k", "4", "--tokens", "64",
            "--batch", "32", "--context-length", "8", "--batch-size", "2",
            "--eval-tokens", "0", "-o", str(folder / "t"),
        ],
        "extract": ["extract", source, *OPTIONS, "-o", str(folder / "s")],
    }  # fmt: skip


@pytest.mark.filterwarnings("default::qwen_scope.errors.QwenScopeWarning")
@pytest.mark.parametrize("name", ["predict", "fit", "find", "train", "extract"])
def test_bad_rows_among_good_ones(tmp_path: Path, rule: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    mixed = [row for pair in zip(GOOD, BAD[:8], strict=True) for row in pair] + BAD[8:]
    source = corpus(tmp_path / "mixed.jsonl", *mixed)
    other = corpus(tmp_path / "other.jsonl", *(row.replace(b"station", b"Bahnhof") for row in GOOD))
    assert main(commands(source, other, rule, tmp_path)[name]) == 0
    out, err = capsys.readouterr()
    if name == "extract":
        assert "Rows that could not be read" in out
    else:
        assert err.count("can't be used and are passed over") == 1
        assert name == "train" or "12 of 20 rows" in err
    if name == "predict":
        assert [json.loads(line)["row"] for line in (tmp_path / "p.jsonl").read_text().splitlines()] == list(
            range(1, 17, 2)
        )


@pytest.mark.filterwarnings("default::qwen_scope.errors.QwenScopeWarning")
@pytest.mark.parametrize("name", ["predict", "fit", "find", "train", "extract"])
def test_bad_rows_alone(tmp_path: Path, rule: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    source = corpus(tmp_path / "bad.jsonl", *BAD)
    other = corpus(tmp_path / "other.jsonl", *GOOD)
    assert main(commands(source, other, rule, tmp_path)[name]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("qwen-scope: ")
    assert "Traceback" not in err
    assert not (tmp_path / "p.jsonl").exists()
    assert not (tmp_path / "r.json").exists()
    assert not (tmp_path / "s").exists()

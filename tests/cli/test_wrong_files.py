"""Files of another kind than the command reads, and damaged ones where nothing checks their sum, are one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qwen_scope.cli import main
from qwen_scope.errors import FormatError
from qwen_scope.files import read_object


def sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "bug" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"5", b"\xff", b'{"config": 5}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_metrics_that_are_no_lab_s(data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.json").write_bytes(data)
    assert "metrics.json" in sentence(["lab", "card", str(tmp_path)], capsys)


def test_metrics_of_another_shape_are_no_lab_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "card", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    for key in list(metrics):
        (tmp_path / "metrics.json").write_text(json.dumps(metrics | {key: "\x1b[31m"}))
        assert main(["lab", "card", str(tmp_path)]) in (0, 2), key
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err


@pytest.mark.parametrize("data", [b"\xff", b"", b"{}", b"[" * 100_000, b"null"])
def test_a_manifest_that_is_none_where_a_store_would_go_on(
    data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_bytes(data)
    words = ["extract", "lab", "--layers", "5", "--sample", "2", "-o", str(tmp_path / "store")]
    assert "manifest.json" in sentence(words, capsys)


@pytest.mark.parametrize(
    ("name", "says"),
    [("p.json", "row per line"), ("p.csv", "no text"), ("p.tsv", "no text"), ("p.jsonl", "no text")],
)
def test_rows_without_a_text_are_no_prompts(
    name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, texts = tmp_path / name, tmp_path / "p.txt"
    rows.write_text('{"prose": "hi"}\n')
    texts.write_text("hi\n")
    sweep = ["--feature", "5/1", "--regex", "a", "--model", "lab"]
    assert says in sentence(["sweep", str(rows), *sweep], capsys)
    assert says in sentence(["sweep", str(texts), *sweep, "--reference", str(rows)], capsys)
    sides = dict.fromkeys(("positive", "negative", "unrelated"), texts) | {"negative": rows}
    words = [word for side, path in sides.items() for word in (f"--{side}", str(path))]
    assert name in sentence(["validate", str(texts), *sweep, *words], capsys)


def test_a_file_without_end_is_not_read_to_it(tmp_path: Path) -> None:
    if os.path.exists("/dev/zero"):
        with pytest.raises(FormatError, match="too large"):
            read_object("/dev/zero")

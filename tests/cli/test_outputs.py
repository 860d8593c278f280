"""Every output of every command is whole or absent, and none of its inputs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny
from full_disk import full_after

from qwen_scope.analysis import Rule, RuleFeature
from qwen_scope.cli import main, output
from qwen_scope.files import lock_folder
from qwen_scope.sae import load_sae

WHERE = ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i, text in enumerate(tiny.TEXTS)))
    return path


@pytest.fixture
def rule(tmp_path: Path) -> Path:
    sae = load_sae(tiny.folder() / "sae", 0)
    Rule("r", (RuleFeature(0, 3, 0.0, 1.0, 1.0, sae.identity.fingerprint),), {}).save(tmp_path / "rule.json")
    return tmp_path / "rule.json"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["c.jsonl", "./sub/../c.jsonl", "hard", "soft", "rule.json"])
def test_predict_refuses_its_own_input(tmp_path: Path, corpus: Path, rule: Path, name: str, capsys) -> None:
    (tmp_path / "sub").mkdir()
    os.link(corpus, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(corpus)
    before = files(tmp_path)
    assert main(["classify", "predict", str(rule), str(corpus), "-o", str(tmp_path / name), *WHERE]) == 2
    assert "is what is read" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_an_empty_corpus_and_a_folder_of_inputs_leave_earlier_outputs(tmp_path: Path, corpus, rule, capsys) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "out.jsonl").write_text("earlier\n")
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "a.txt").write_text("hello")
    for source, out, said in (
        ("empty.jsonl", "out.jsonl", "no document to label"),
        ("many", "many/out.jsonl", "which is read"),
        ("c.jsonl", "many", "is a folder"),
    ):
        words = ["classify", "predict", str(rule), str(tmp_path / source), "-o", str(tmp_path / out), *WHERE]
        assert main(words) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "earlier\n"
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["a.txt"]


def test_predict_on_a_full_disk_keeps_the_earlier_output(tmp_path: Path, corpus: Path, rule: Path, capsys) -> None:
    out = tmp_path / "out.jsonl"
    words = ["classify", "predict", str(rule), str(corpus), "-o", str(out), *WHERE]
    assert main(words) == 0
    whole = out.read_bytes()
    assert len(whole) > 300
    out.write_text("earlier\n")
    out.chmod(0o640)
    with full_after(200):
        assert main(words) == 2
    assert "no room to write" in capsys.readouterr().err
    assert out.read_text() == "earlier\n"
    assert main(words) == 0
    assert out.read_bytes() == whole
    assert out.stat().st_mode & 0o777 == 0o640
    assert not list(tmp_path.glob(".unfinished*"))


def test_predict_writes_a_stream(corpus: Path, rule: Path, capfd) -> None:
    assert main(["classify", "predict", str(rule), str(corpus), *WHERE]) == 0
    plain = capfd.readouterr().out
    assert main(["classify", "predict", str(rule), str(corpus), "-o", "/dev/stdout", *WHERE]) == 0
    assert capfd.readouterr().out == plain


def test_a_report_is_whole_or_the_old_one(tmp_path: Path, capsys) -> None:
    for name, text in (("east", "车站在哪里"), ("west", "hello friend")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(8)))
    words = ["classify", "fit", str(tmp_path / "east.jsonl"), str(tmp_path / "west.jsonl"), *WHERE, "--layers", "0"]
    rule, out = tmp_path / "rule.json", tmp_path / "report"
    assert main([*words, "-r", str(rule), "-o", str(out)]) == 0
    before = files(out), files(tmp_path)
    assert {"report.html", "figure1.png"} <= set(before[0])
    assert ".lock" not in before[0]
    with full_after(3000):
        assert main([*words, "-r", str(rule), "-o", str(out)]) == 2
    assert (files(out), files(tmp_path)) == before
    with lock_folder(out):
        assert main([*words, "-o", str(out)]) == 2
    assert f"another process (process {os.getpid()}) is writing to" in capsys.readouterr().err
    for bad, said in (
        (["-r", str(tmp_path / "east.jsonl")], "is what is read"),
        (["-r", str(tmp_path)], "is a folder"),
        (["-o", str(tmp_path / "east.jsonl")], "is a file"),
        (["-o", str(tiny.folder() / "model" / "report")], "which is read"),
    ):
        assert main([*words, *bad]) == 2
        assert said in capsys.readouterr().err
    assert (files(out), files(tmp_path)) == before


def test_recipes_keep_what_was_there(tmp_path: Path, capsys) -> None:
    out = tmp_path / "r.json"
    words = ["steer", "hello", *WHERE, "--feature", "0/3", "--amount", "1", "--max-new-tokens", "2"]
    assert main([*words, "--save-recipe", str(out)]) == 0, capsys.readouterr().err
    before = files(tmp_path)
    with full_after(50):
        assert main([*words, "--save-recipe", str(out)]) == 2
    assert main(["steer", "hello", *WHERE, "--recipe", str(out), "--save-recipe", str(out)]) == 2
    assert "is what is read" in capsys.readouterr().err
    assert main([*words, "--save-recipe", str(tmp_path / "r.txt")]) == 2
    assert "has to end in .json or .yaml" in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("one\u2028still one\r\ntwo\n")
    sweep = ["sweep", str(tmp_path / "p.txt"), *WHERE, "--feature", "0/3", "--regex", "x"]
    for bad in (["--plot", str(tmp_path / "p.txt")], ["--save-recipe", str(tmp_path / "p.txt")]):
        assert main([*sweep, *bad]) == 2
        assert "has to end in" in capsys.readouterr().err
    os.remove(tmp_path / "p.txt")
    assert files(tmp_path) == before


def test_prompts_end_at_newline_alone(tmp_path: Path) -> None:
    from qwen_scope.cli.sweep import read_prompts

    (tmp_path / "p.txt").write_bytes("one\u2028still one\r\ntwo\u0085\x0b\n\n three".encode())
    assert read_prompts(tmp_path / "p.txt") == ["one\u2028still one", "two\u0085\x0b", " three"]


def test_convert_holds_its_folder_and_leaves_nothing_unfinished(tmp_path: Path, capsys) -> None:
    words = ["convert", str(tiny.folder() / "sae"), "-o", str(tmp_path / "out"), "--layers", "0"]
    with full_after(2000):
        assert main(words) == 2
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".unfinished-{'a' * 32}.safetensors").write_bytes(bytes(1000))
    assert main(words) == 0
    assert not [name for name in files(tmp_path / "out") if name.startswith(".")]
    with lock_folder(tmp_path / "out"):
        assert main(words) == 2
    assert "is writing to" in capsys.readouterr().err
    for inside in (tiny.folder() / "sae", tiny.folder() / "sae" / "below"):
        assert main([*words[:3], str(inside)]) == 2
        assert "which is read" in capsys.readouterr().err


def test_each_answer_reaches_a_reader_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output that is a pipe is buffered; whoever reads it sees the line when it is printed."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as reader, os.fdopen(write, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        output.print_json_line({"label": True})
        os.set_blocking(read, False)
        assert reader.read() == b'{"label": true}\n'

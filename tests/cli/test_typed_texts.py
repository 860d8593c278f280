"""Texts of the command line: a file's name given as one, arguments that are no Unicode, locales without an encoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_scope.cli import main, options

SRC = Path(__file__).parents[2] / "src"
LAB = ("--model", "lab")

NAMES = (
    "prompts.txt",
    "a b.txt",
    "über 中文.md",
    "x",
    "deep/in/here.jsonl",
    "it's.txt",
    "$HOME;ls",
    "-n",
    "🙂.csv",
    "[bold]x",
)
NO_NAMES = ("Hello", "a" * 5000, "a/b", "prompts.txt ", "two\nlines.txt", "nul\x00.txt", ".", "..", "/", "./", "")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of every name, which commands run in."""
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("Guten Morgen!\n", encoding="utf-8")
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_a_file_s_name_that_is_read_as_a_text_is_said(name: str, here: Path, capsys) -> None:
    assert options.typed(name) == name
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f'{name} is a file here; its name was read as the text; to read it, write "$(cat ' in err
    typed = err.strip().removesuffix('"').partition('write "$(cat ')[2].removesuffix(")")
    if not name.startswith("-"):
        shell = subprocess.run(["sh", "-c", f"cat {typed}"], capture_output=True, cwd=here, timeout=20)
        assert shell.stdout == b"Guten Morgen!\n"


@pytest.mark.parametrize("text", NO_NAMES, ids=lambda text: repr(text[:12]))
def test_nothing_is_said_of_other_texts(text: str, here: Path, capsys) -> None:
    assert options.typed(text) == text
    assert capsys.readouterr() == ("", "")


def test_a_folder_s_name_is_said_too(here: Path, capsys) -> None:
    assert options.typed("texts") == "texts"
    assert "texts is a folder here; its name was read as the text; read its texts with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["features", "prompts.txt", "--layers", "2"], ["prompts.txt"]),
        (["features", "Hi", "--response", "a b.txt", "--layers", "2"], ["a b.txt"]),
        (["compare", "prompts.txt", "x", "--layers", "2", "--count", "all"], ["prompts.txt", "x"]),
        (["compare", "Hi", "x", "--layers", "2", "--count", "all"], ["x"]),
        (["steer", "prompts.txt", "--feature", "2/3", "--amount", "1", "--max-new-tokens", "1"],
         ["prompts.txt"]),
        (["features", "Hi there", "--layers", "2"], []),
        (["convert", "lab", "--layers", "2", "--layout", "sae_lens", "-o", "out", "--text", "prompts.txt"],
         ["prompts.txt"]),
    ],
)  # fmt: skip
def test_every_command_says_it_of_its_own_texts(words: list[str], said: list[str], here: Path, capsys) -> None:
    assert main([*words, *LAB]) == 0
    err = capsys.readouterr().err
    assert [name for name in ("prompts.txt", "a b.txt", "x") if f"{name} is a file here" in err] == said
    assert err.count("is a file here") == len(said)


def test_one_text_of_a_comparison_may_be_piped(here: Path, capsys, monkeypatch) -> None:
    import io

    for words, piped in ((["-", "Guten Tag"], "a"), (["Guten Tag", "-"], "b")):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello there\n"))
        assert main(["compare", *words, "--layers", "2", "--json", *LAB]) == 0
        assert json.loads(capsys.readouterr().out)[piped] == "Hello there"
    assert main(["compare", "-", "-", *LAB]) == 2
    assert "one text" in capsys.readouterr().err


# --- arguments that are no Unicode -----------------------------------------------------------------------------------

ODD = "caf\udce9"
SPLIT = "Gr\udcc3\udcb6\udcc3\udc9fe"
"""What Python makes of the UTF-8 of Größe where the locale reads ASCII."""

WORDS = {
    "a text": ["features", "{}", *LAB],
    "the second text": ["compare", "a", "{}", *LAB],
    "a prompt": ["steer", "{}", "--feature", "1", "--layer", "2", "--amount", "1"],
    "a file": ["extract", "{}.txt", "-o", "out"],
    "a folder": ["store", "{}"],
    "an output": ["lab", "examples", "-o", "{}"],
    "a label": ["find", "store", "--label", "{}"],
    "a note": ["label", "store", "-f", "3", "--note", "{}"],
    "a feature": ["show", "store", "--layer", "2", "-f", "{}"],
    "a model": ["features", "x", "--model", "{}"],
    "a group of SAEs": ["convert", "{}", "-o", "out"],
    "a command": ["{}"],
    "an option": ["demo", "--{}"],
    "a query": ["store", "store", "--sql", "SELECT '{}'"],
}


@pytest.mark.parametrize("word", [ODD, SPLIT, "\ud800", "a\udfff"], ids=ascii)
@pytest.mark.parametrize("what", WORDS)
def test_an_argument_that_is_no_unicode_is_one_sentence(
    what: str, word: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([one.replace("{}", word) for one in WORDS[what]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert ("PYTHONUTF8=1" if word == SPLIT else "is not UTF-8") in err
    assert ("Größe" in err) == (word == SPLIT)
    assert list(tmp_path.iterdir()) == []


# --- other locales ---------------------------------------------------------------------------------------------------

EVERYWHERE = [
    ["lab", "texts", "-n", "2", "--language", "ja", "--register", "archaic"],
    ["lab", "examples", "-o", "ex"],
    ["features", "Größe 中文 — 🙂", "--layers", "2", *LAB],
    ["features", "Größe 中文 — 🙂", "--layers", "2", "--json", *LAB],
    ["steer", "Größe", "--feature", "4/7", "--amount", "0.5", "--max-new-tokens", "4", "--save-recipe",
     "r.yaml"],
    ["steer", "Größe", "--recipe", "r.yaml", "--max-new-tokens", "4", "--stream"],
    ["extract", "ex/german.txt", "-o", "store", "--layers", "4"],
    ["label", "store", "-f", "4/7", "--note", "Größe 中"],
    ["find", "store", "--label", "Größe"],
    ["show", "store", "-f", "4/7", "--html", "page.html"],
    ["store", "store", "--sql", "SELECT text FROM tokens LIMIT 3", "--json"],
]  # fmt: skip

RUN = """
import json, sys
from qwen_scope.cli import main
codes = [main(words) for words in json.loads(sys.argv[1])]
sys.stdout.flush()
sys.stderr.write("\\n" + json.dumps(codes))
"""


def in_one_process(commands: list[list[str]], folder: Path, **env: str) -> tuple[list[int], bytes, str]:
    """The exit codes of commands that run one after another in a folder, what they print, and what they say."""
    kept = {name: value for name, value in os.environ.items() if name not in ("LANG", "LC_CTYPE", "LC_ALL")}
    own = {"PYTHONPATH": str(SRC), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        env={**kept, **own, **env}, cwd=folder, capture_output=True, timeout=300,
    )  # fmt: skip
    err = done.stderr.decode("utf-8", "replace")
    *told, codes = err.strip().split("\n")
    assert "Traceback" not in err, err[-3000:]
    return json.loads(codes), done.stdout, "\n".join(told)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["C", "cp1252"])
def test_every_locale_gets_right_output(kind: str, tmp_path: Path) -> None:
    none = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env = none if kind == "C" else {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": kind}
    folder = tmp_path / "Größe 中"
    folder.mkdir()
    codes, out, err = in_one_process(EVERYWHERE, folder, **env)
    assert codes == [0] * len(EVERYWHERE), err
    shown = out.decode("ascii" if kind == "C" else kind)
    for text in ("\\u4e2d", "Gr\\xf6\\xdfe" if kind == "C" else "Größe"):
        assert text in shown
    lines = (folder / "store" / "notes.jsonl").read_text(encoding="utf-8").split("\n")
    notes = [
        one for one in map(json.loads, filter(None, lines)) if one["kind"] != "measure"
    ]  # show keeps what it measures
    assert [note["body"]["text"] for note in notes] == ["Größe 中"]


@pytest.mark.slow
def test_a_folder_whose_name_is_no_utf_8_is_one_sentence(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    commands = [
        ["lab", "examples", "-o", "ex"],
        ["convert", "lab", "--layers", "4", "-o", "sae"],
        ["extract", "ex/german.txt", "-o", "store", "--layers", "4"],
        ["extract", "ex/german.txt", "-o", str(tmp_path / "store"), "--layers", "4", "--sae", "./sae", *LAB],
        ["store", str(tmp_path / "store")],
    ]
    codes, _, err = in_one_process(commands, folder, LC_ALL="C.UTF-8")
    assert codes[:3] == [0, 0, 2], err
    assert codes[3:] in ([0, 0], [2, 2]), err
    assert "DuckDB reads no folder whose name is not UTF-8: rename" in err
    assert "this is a bug" not in err


@pytest.mark.slow
def test_what_is_piped_is_read_as_utf_8_where_the_locale_says_nothing() -> None:
    env = {**os.environ, "PYTHONPATH": str(SRC), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "qwen_scope.cli", "features", "-", "--layers", "2", "--json", *LAB]
    done = subprocess.run(command, env=env, input="Größe 中\n".encode(), capture_output=True, timeout=120)
    assert (done.returncode, json.loads(done.stdout)["text"]) == (0, "Größe 中")
    typed = [*command[:4], "Größe", *command[5:]]
    done = subprocess.run(typed, env=env, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
    assert b"PYTHONUTF8=1" in done.stderr

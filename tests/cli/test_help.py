"""Help fits a terminal, is listed under headings, and ends with examples that the parser takes."""

from __future__ import annotations

import re
import shlex

import pytest
from typed import COMMANDS, LEAVES, PROGRAM, context

from qwen_scope.cli import main
from qwen_scope.cli.examples import EXAMPLES, WIDTH, broken


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path or "qwen-scope")
def test_help_fits_80_columns_and_cuts_nothing(path: str, capsys) -> None:
    assert main([*path.split(), "-h"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 80] == []
    if path not in LEAVES:
        assert "..." not in out.partition("\n")[2], "a sentence is cut"
    else:
        assert re.search(r"(?m)^Examples?:$", out)


def test_the_program_lists_its_commands_under_headings(capsys) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    headings = re.findall(r"(?m)^(\S.*):$", out)
    assert headings == [
        "Options",
        "First steps",
        "Features of a text",
        "Features of a corpus",
        "Steering",
        "SAEs and training",
    ]
    listed = re.findall(r"(?m)^  ([a-z]+)  ", out)
    assert sorted(listed) == sorted(PROGRAM.commands)
    assert listed[0] == "demo"


def test_every_command_has_examples_and_every_example_a_command() -> None:
    assert set(EXAMPLES) == set(LEAVES)


@pytest.mark.parametrize(("path", "line"), [(path, line) for path, lines in EXAMPLES.items() for line in lines])
def test_an_example_is_of_its_command_and_parses(path: str, line: str) -> None:
    assert context(line).info_name == path
    again = " ".join(part.removesuffix("\\").strip() for part in broken(line))
    assert again == line, "breaking a line changes nothing"
    assert all(len(part) <= WIDTH for part in broken(line))


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("qwen-scope catalog", 1),
        ("qwen-scope steer " + '"' + "x " * 60 + '"' + " --layer 5", 3),
        ("qwen-scope find " + " ".join(f"--option{i} value{i}" for i in range(12)), 4),
    ],
)
def test_lines_break_between_words_alone(line: str, parts: int) -> None:
    assert len(broken(line)) == parts
    assert shlex.split(" ".join(part.removesuffix("\\") for part in broken(line))) == shlex.split(line)


# What each command shows or does where an option is left out, as its help says it.
SAID = {
    "features": ("--layers", "Default: the middle; all with --response or --json."),
    "compare": ("--layers", "Default: all"),
    "train": ("--layers", "Default: those of --start-from, or all."),
    "posttrain prepare": ("--layers", "Default: the last two"),
    "posttrain sft": ("--layers", "Default: the table's"),
    "posttrain repetition": ("--layers", "Default: all"),
    "sweep": ("--amounts", "Default: 0.1 to 1.6."),
    "extract": ("--sample", "Default: all; of the lab 1000."),
    "analyze drift": ("--reduction", "Default: max for drift, else last."),
}


@pytest.mark.parametrize("path", SAID)
def test_help_tells_the_true_default(path: str, capsys) -> None:
    option, says = SAID[path]
    assert main([*path.split(), "-h"]) == 0
    out = " ".join(capsys.readouterr().out.split()).replace("--layers, --layer", "--layers")
    assert re.search(rf"{option}\b(?:(?! --\w).)*{re.escape(says)}", out), out

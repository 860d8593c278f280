"""The names a stranger may rely on. Adding one is a decision; taking one away breaks somebody."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from typed import PROGRAM

import qwen_scope
from qwen_scope.cli import main

ROOT = Path(__file__).parents[1]

ROOT_NAMES = {
    "FeatureActs",
    "FeatureStore",
    "HookPoint",
    "Intervention",
    "Scope",
    "catalog",
    "load_sae",
    "load_scope",
    "save_sae",
}
COMMANDS = {
    "demo",
    "catalog",
    "plan",
    "convert",
    "features",
    "compare",
    "steer",
    "sweep",
    "validate",
    "extract",
    "store",
    "find",
    "show",
    "export",
    "label",
    "analyze",
    "classify",
    "lab",
    "train",
    "eval",
    "explore",
    "lens",
    "match",
    "score",
    "card",
    "serve",
    "why",
    "posttrain",
    "synthesize",
}


def test_the_root_offers_exactly_these_names() -> None:
    assert set(qwen_scope.__all__) == ROOT_NAMES


@pytest.mark.parametrize("name", sorted(ROOT_NAMES))
def test_each_name_can_be_had(name: str) -> None:
    assert getattr(qwen_scope, name) is not None


def test_the_version_is_the_project_s() -> None:
    """Python, the command and the changelog name the version that is built."""
    built = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert qwen_scope.__version__ == built
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", changes, re.MULTILINE)
    assert not released or released[0] == built
    assert "## [Unreleased]" in changes


def test_the_command_says_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qwen-scope {qwen_scope.__version__}\n"


def test_types_are_offered_to_checkers() -> None:
    assert (Path(qwen_scope.__file__).parent / "py.typed").is_file()


def test_the_commands_are_these() -> None:
    assert set(PROGRAM.list_commands(None)) == COMMANDS

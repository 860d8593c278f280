"""What a short command costs before it does anything."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from qwen_scope.cli import main


def loaded_by(*words: str) -> set[str]:
    """The modules of the command line that a run in a process of its own imports."""
    code = f"""
import contextlib, io, sys
from qwen_scope.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main({list(words)!r}) == 0
print(*[name for name in sys.modules if name.startswith("qwen_scope.cli.")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_command_imports_no_other_command() -> None:
    loaded = loaded_by("catalog")
    assert "qwen_scope.cli.catalog" in loaded
    others = ("train", "posttrain", "steer", "serve", "find", "extract")
    assert not loaded & {f"qwen_scope.cli.{name}" for name in others}


def test_a_misspelt_command_is_told_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetures"]) == 2
    assert "Did you mean 'features'?" in capsys.readouterr().err


def test_a_caller_in_python_keeps_its_collector() -> None:
    before = gc.get_threshold()
    assert main(["--version"]) == 0
    assert gc.get_threshold() == before

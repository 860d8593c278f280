"""The guides that say how to add something, followed to the letter in a copy of the checkout.

A `python` block whose first line is `# PATH` is that file; a `diff` block under `# PATH` changes it, each part where
its unchanged lines stand once; the `python -m pytest ...` lines of `text` blocks are the contract tests.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
GUIDES = [page for page in sorted((ROOT / "docs").glob("add-*.md")) if "python -m pytest" in page.read_text()]

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its tests; the lab's weights are linked, the rest is there to be changed."""
    package = tmp_path / "src" / "qwen_scope"
    shutil.copytree(ROOT / "src" / "qwen_scope", package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (package / "assets").symlink_to(ROOT / "src" / "qwen_scope" / "assets")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_a_guide_that_is_followed_passes_the_contract(page: Path, copy: Path) -> None:
    commands = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        language, (first, _, body) = match[1], match[2].partition("\n")
        if language == "python" and first.startswith("# src/"):
            target = copy / first.removeprefix("# ")
            assert not target.exists(), f"{first}: the guide adds a file that is there already"
            target.write_text(body, encoding="utf-8")
        elif language == "diff":
            change(copy / first.removeprefix("# "), body)
        elif language == "text":
            commands += [line for line in match[2].splitlines() if line.startswith("python -m pytest ")]
    assert commands
    where = {**os.environ, "PYTHONPATH": str(copy / "src")}
    for line in commands:
        words = [sys.executable, *shlex.split(line)[1:], "-p", "no:cacheprovider"]
        done = subprocess.run(words, cwd=copy, env=where, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-4000:]}{done.stderr[-1000:]}"


def change(path: Path, diff: str) -> None:
    """Apply the parts of a diff without line numbers."""
    text = path.read_text(encoding="utf-8")
    for part in diff.split("@@\n"):
        lines = part.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        assert text.count(before) == 1, f"{path.name} has these lines {text.count(before)} times:\n{before}"
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_what_a_guide_adds_is_written_like_the_rest(page: Path, tmp_path: Path) -> None:
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        first, _, body = match[2].partition("\n")
        if match[1] == "python" and first.startswith("# src/"):
            (tmp_path / "new.py").write_text(body, encoding="utf-8")
            settings = ["--config", str(ROOT / "pyproject.toml"), str(tmp_path / "new.py")]
            for words in (["check"], ["format", "--check"]):
                done = subprocess.run([sys.executable, "-m", "ruff", *words, *settings], capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr

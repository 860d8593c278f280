"""The code in README and docs runs as it stands, on the lab; links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list:
    found = []
    for page in PAGES:
        for i, match in enumerate(BLOCK.finditer(page.read_text())):
            if match[1] == language:
                found.append(pytest.param(match[2], id=f"{page.name}-{i}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("commands", blocks("sh"))
def test_commands_run(commands: str, capsys, tmp_path, monkeypatch) -> None:
    from qwen_scope.cli import main

    monkeypatch.chdir(tmp_path)
    for line in commands.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "qwen-scope":
            assert main(words[1:]) == 0, line
        else:
            assert not words or words[0] == "make", f"a command the documentation names but no test runs: {line}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^\.PHONY: (.*)$", make := (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split())
    targets |= set(re.findall(r"^EXTRAS := (.*)$", make, re.MULTILINE)[0].split())
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make (\w+)", page.read_text(), re.MULTILINE):
            assert target in targets, f"{page.name} names make {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

"""The code in README and docs runs as it stands, on the lab; links lead somewhere.

Commands in `sh` blocks are typed in the order in which they stand, in a folder that holds a clean checkout and nothing
else; those in `text` blocks need the Hub, a server or a long time, and are parsed.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typed import context, typed

from qwen_scope.analysis import ANALYSES
from qwen_scope.cli import main
from qwen_scope.cli.examples import EXAMPLES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

FIGURE = r"\d+\.\d+|\w+|[^\w\s]"
"""A figure, a word or a sign."""

# Examples of help that run for minutes or until they are stopped; vLLM is not here.
LONG = ("explore", "serve", "lab build", "lab panel", "posttrain repetition", "posttrain rl")


def blocks(page: Path, language: str) -> list[str]:
    return [match[2] for match in BLOCK.finditer(page.read_text(encoding="utf-8")) if match[1] == language]


def shown(page: Path, *languages: str) -> list[str]:
    """The commands of a page, in order."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [line for match in found if match[1] in languages for line in typed(match[2])]


# Blocks that are a file of the package are written and tested by test_guides.py.
PYTHON = [
    pytest.param(code, id=f"{page.name}-{i}")
    for page in PAGES
    for i, code in enumerate(blocks(page, "python"))
    if not code.startswith("# src/")
]
WITH_COMMANDS = [page for page in PAGES if shown(page, "sh")]


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = dict(ANALYSES)
    exec(compile(code, "block", "exec"), {"__name__": "block"})
    ANALYSES.clear()  # a page that adds one adds it to itself
    ANALYSES.update(known)


def test_what_the_readme_shows_is_printed(capsys, tmp_path, monkeypatch) -> None:
    """Word by word, figures within a hundredth; spaces at the end of lines aside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for block in blocks(ROOT / "README.md", "console"):
        for part in block.split("$ qwen-scope ")[1:]:
            line, _, expected = part.partition("\n")
            assert main(shlex.split(line)) == 0
            words, said = re.findall(FIGURE, capsys.readouterr().out), re.findall(FIGURE, expected)
            assert len(words) == len(said), line
            for one, other in zip(words, said, strict=True):
                if one != other:
                    assert float(one) == pytest.approx(float(other), rel=0.01), line


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of a clean checkout, where commands are typed; an empty one where git has none."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_commands_run_in_order_in_a_clean_checkout(page: Path, checkout: Path, capsys) -> None:
    lines = shown(page, "sh")
    if page.name == "README.md":  # its examples and those of help belong together
        lines += [line for line in of_help() if line not in lines]
    for line in lines:
        assert run(line) == 0, f"{line}\n{capsys.readouterr().err[-2000:]}"


def run(line: str) -> int:
    """Type a line."""
    from qwen_scope.cli import main

    words = shlex.split(line)
    if words[0] == "make":
        return 0
    assert words[0] == "qwen-scope", f"a command the documentation names but no test runs: {line}"
    return main(words[1:])


def of_help() -> list[str]:
    """The examples of help that run here."""
    lines = [line for path, some in EXAMPLES.items() if path not in LONG for line in some]
    return [line for line in lines if "Qwen/" not in line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_do_not_run_here_parse(page: Path) -> None:
    for line in shown(page, "text", "sh"):
        if line.startswith("qwen-scope "):
            context(line)


def test_what_stands_in_text_could_not_run_here() -> None:
    for line in shown(ROOT / "README.md", "text"):
        assert not line.startswith("qwen-scope ") or "Qwen/" in line or context(line).info_name in LONG, line


def test_examples_of_help_are_the_readme_s_where_it_has_the_command() -> None:
    lines = [line for line in shown(ROOT / "README.md", "sh", "text") if line.startswith("qwen-scope ")]
    for path in {context(line).info_name for line in lines}:
        assert set(EXAMPLES[path]) & set(lines), f"no example of {path} is the README's"


def test_the_readme_counts_what_the_catalog_has() -> None:
    from qwen_scope.sae import catalog

    said = re.search(r"lists (\d+) groups with (\d+) SAEs", " ".join((ROOT / "README.md").read_text().split()))
    assert said is not None
    assert [int(n) for n in said.groups()] == [len(catalog.groups()), sum(group.layers for group in catalog.groups())]
    said = re.search(
        r"has (\d+) groups that others released, with (\d+) SAEs", " ".join((ROOT / "README.md").read_text().split())
    )
    assert said is not None
    others = catalog.community()
    assert [int(n) for n in said.groups()] == [len(others), sum(group.layers for group in others)]


def test_the_commands_name_no_file_that_nobody_has() -> None:
    """What a README command reads has been written by one before it, or is in the checkout."""
    written = ["lab"]
    for line in shown(ROOT / "README.md", "sh"):
        ctx = context(line) if line.startswith("qwen-scope ") else None
        for one in ctx.command.params if ctx else ():
            value = ctx.params.get(one.name)
            for path in value if isinstance(value, list) else [value]:
                if path is None or not re.match(r"out/|\S+\.(txt|jsonl?|ya?ml|csv)$", str(path)):
                    continue
                if one.name in ("out", "html", "save_recipe", "student") or (one.name, ctx.info_name) == (
                    "rule",
                    "classify fit",
                ):
                    written.append(str(path))
                else:
                    assert any(str(path) == had or str(path).startswith(f"{had}/") for had in written), line


def test_make_targets_exist() -> None:
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {
        word for line in re.findall(r"^(?:\.PHONY:|EXTRAS :=) (.*)$", make, re.MULTILINE) for word in line.split()
    }
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make (\w+)", page.read_text(), re.MULTILINE):
            assert target in targets, f"{page.name} names make {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

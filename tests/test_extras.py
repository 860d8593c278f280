"""What comes with an extra, and how a command that lacks it ends: one sentence with a line that works as it stands."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qwen_scope.errors import NotFoundError, install_line, need

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE = {re.split(r"[^\w-]", line)[0] for line in PROJECT["dependencies"]}
EXTRAS = {name: asked for name, asked in PROJECT["optional-dependencies"].items() if name != "dev"}

# An interpreter in which no package of an extra can be found. accelerate stays: transformers asks pip whether it is
# installed, and imports it then.
WITHOUT = """
import sys
class Without:
    hidden = {"datasets", "numba", "triton", "gradio", "trl", "peft", "tensorboard", "wandb", "bitsandbytes"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util
found, without = importlib.util.find_spec, Without()
importlib.util.find_spec = lambda name, package=None: None if name in Without.hidden else found(name, package)
sys.meta_path.insert(0, without)
from qwen_scope.cli import main
"""


def test_what_the_readme_needs_is_core() -> None:
    assert {"pyarrow", "duckdb", "scikit-learn", "matplotlib"} <= CORE


@pytest.mark.parametrize("extra", EXTRAS)
def test_make_adds_every_extra(extra: str) -> None:
    assert extra in re.findall(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_what_the_core_lacks(extra: str) -> None:
    own = [line for line in EXTRAS[extra] if not line.startswith("qwen-scope[")]
    assert own, "an extra that adds nothing has no reason to be"
    assert not {re.split(r"[^\w-]", line)[0] for line in own} & CORE
    for line in EXTRAS[extra]:
        if inner := re.match(r"qwen-scope\[(.*)\]", line):
            assert set(inner[1].split(",")) <= set(EXTRAS)


def test_nothing_says_that_the_package_is_on_pypi() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("*.py"), ROOT / "app.py"]
    assert [str(page) for page in pages if re.search(r"install\s+'?qwen-scope", page.read_text())] == []


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        (["gradio"], ["gradio<7,>=6.29"]),
        (["trl", "peft"], ["trl<2,>=1.16", "peft>=0.21"]),
        (["datasets"], ["datasets>=4"]),
        (["Datasets"], ["datasets>=4"]),
        (["bitsandbytes"], ["bitsandbytes"]),
        (["numba"], ["numba>=0.61"]),
        (["tensorboard", "wandb"], ["tensorboard>=2.18", "wandb>=0.19"]),
    ],
)
def test_the_line_to_type_names_this_interpreter_and_the_versions_asked_for(packages: list, words: list) -> None:
    python, *rest = shlex.split(install_line(*packages))
    assert rest == ["-m", "pip", "install", *words]
    assert Path(python).absolute() == Path(sys.executable)


def test_the_line_is_short_where_the_environment_lies_in_this_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert install_line("gradio").startswith(".venv/bin/python -m pip install ")
    monkeypatch.setattr(sys, "executable", "/opt/a b/python")
    assert install_line("gradio").startswith("'/opt/a b/python' -m pip install ")


def test_a_sentence_names_what_is_missing_alone() -> None:
    need("this", "pytest", "json")
    with pytest.raises(NotFoundError, match=r"^this needs the package nosuch; install it with: .* install nosuch$"):
        need("this", "pytest", "nosuch")
    with pytest.raises(NotFoundError, match=r"^this needs the packages nosuch, nor; install them with: .* nosuch nor$"):
        need("this", "nosuch", "nor")


def run_without(*lines: list[str], folder: Path) -> list[tuple[int, str]]:
    """Exit code and standard error of commands where the extras are not installed, in one interpreter."""
    code = WITHOUT + (
        "import contextlib, io, json\n"
        f"for words in {lines!r}:\n"
        "    err = io.StringIO()\n"
        "    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):\n"
        "        code = main(words)\n"
        "    print(json.dumps([code, err.getvalue()]))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_command_without_its_extra_ends_with_the_line_to_type(tmp_path: Path) -> None:
    small = ["--d-sae", "64", "--k", "4", "--tokens", "4096", "-o", "run"]
    asked = {
        "gradio": ["explore"],
        "vllm": ["serve", "lab", "--layers", "4"],
        "trl": ["posttrain", "prepare", "lab", "--target", "zh", "-o", "t.json"],
        "peft": ["posttrain", "sft", "lab", "-o", "out"],
        "datasets": ["extract", "owner/name", "-o", "store"],
        "datasets>=4": ["train", "owner/name", *small],
        "tensorboard": ["train", "lab", *small, "--tensorboard"],
        "wandb": ["train", "lab", *small, "--wandb", "project"],
    }
    for package, (code, err) in zip(asked, run_without(*asked.values(), folder=tmp_path), strict=True):
        assert code == 2
        assert err.startswith("qwen-scope: ")
        assert [line for line in err.splitlines() if "the bundled lab answers" not in line] == err.splitlines()[-1:]
        assert re.search(rf"-m pip install .*{package}", err), err


@pytest.mark.slow
def test_what_needs_no_extra_runs_without_them(tmp_path: Path) -> None:
    small = ["--sample", "8", "--layers", "5"]
    done = run_without(
        ["extract", "lab", *small, "-o", "a"],
        ["extract", "lab", *small, "--seed", "1", "-o", "b"],
        ["analyze", "redundancy", "a", "b", "--out", "report"],
        ["synthesize", "lab", "--sample", "5", "--store", "a", "-f", "3", "--dry-run", "-o", "more"],
        ["export", "a", "--to", "statistics", "-o", "statistics.csv"],
        folder=tmp_path,
    )
    assert [code for code, _ in done] == [0] * 5, done

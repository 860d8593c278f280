"""Every notebook runs from top to bottom, cell by cell, and what a cell ends with shows itself."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "site"))
from notebooks import notebook

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))


def cells(path: Path) -> list[str]:
    """The code cells of a notebook in jupytext's percent format."""
    parts = re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return [part.partition("\n")[2] for part in parts if not part.startswith(" [markdown]")]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs_and_shows_something(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "transformer_lens" in path.stem:
        pytest.importorskip("transformer_lens", reason="tests/peers/run.sh hooks runs this one, where the packages are")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": path.stem}
    for code in cells(path):
        tree = ast.parse(code)
        last = tree.body[-1]
        assert isinstance(last, ast.Expr), f"a cell ends with something to show: {code}"
        exec(compile(ast.Module(tree.body[:-1], []), path.name, "exec"), names)
        value = eval(compile(ast.Expression(last.value), path.name, "eval"), names)
        assert value is not None, code
        html = getattr(value, "_repr_html_", None)
        assert (html() if html is not None else repr(value)).strip(), code


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_opens_as_a_notebook(path: Path) -> None:
    """The header that jupytext reads, and text before code."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ---\n# jupyter:\n#   jupytext:")
    assert re.search(r"^# %% \[markdown\]\n# # \S", text, re.MULTILINE)
    assert len(cells(path)) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_written_as_an_ipynb(path: Path) -> None:
    """The same cells, behind one that installs the package; checked by nbformat where that is installed."""
    made = notebook(path.read_text(encoding="utf-8"))
    code = ["".join(one["source"]) for one in made["cells"] if one["cell_type"] == "code"]
    assert "pip install" in code[0]
    assert code[1:] == [one.strip() for one in cells(path)]
    assert "".join(made["cells"][0]["source"]).startswith("# ")
    assert all(one["outputs"] == [] for one in made["cells"] if one["cell_type"] == "code")
    if importlib.util.find_spec("nbformat"):
        importlib.import_module("nbformat").validate(made)

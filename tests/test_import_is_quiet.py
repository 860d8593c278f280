"""Importing costs nothing and says nothing; `--help` is instant."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "scipy", "huggingface_hub", "safetensors", "duckdb", "gradio", "matplotlib")


def loaded_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nsys.stderr.write(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return set(done.stderr.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import qwen_scope; dir(qwen_scope)") == set()


def test_importing_every_front_door_loads_nothing_heavy() -> None:
    code = """
import importlib, pkgutil, qwen_scope
for room in pkgutil.iter_modules(qwen_scope.__path__):
    if room.ispkg:
        importlib.import_module("qwen_scope." + room.name)
"""
    assert loaded_after(code) == set()


def test_asking_for_the_version_loads_nothing_heavy() -> None:
    assert loaded_after("import qwen_scope; assert qwen_scope.__version__") == set()


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_nothing_heavy(option: str) -> None:
    code = f"""
import contextlib, io
from qwen_scope.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main(["{option}"]) == 0
"""
    assert loaded_after(code) == set()


def test_reading_labels_loads_no_scipy_statistics() -> None:
    """Names stand beside the numbers of short commands, and SciPy's statistics take a third of a second to import."""
    code = "import qwen_scope.features as f; f.Notes, f.labels_from"
    program = f"{code}\nimport sys\nsys.stderr.write(str('scipy.stats' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.endswith("False")

"""The folder of a report holds the figures of its last run, and nothing of another's is taken away."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_scope.analysis import Result
from qwen_scope.cli.analyze import write_report
from qwen_scope.report import Curves, Line

FIGURE = Curves("curve", "x", "y", [Line("a", (0.0, 1.0), (0.0, 1.0))])


def result(figures: int) -> Result:
    return Result({}, (), (FIGURE,) * figures)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("first", "then"), [(3, 1), (2, 0), (1, 2), (10, 1)])
def test_an_earlier_run_leaves_no_figure(first: int, then: int, tmp_path: Path) -> None:
    for figures in (first, then):
        write_report("title", result(figures), tmp_path)
    assert names(tmp_path) == sorted([*(f"figure{i}.png" for i in range(1, then + 1)), "report.html"])


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "figure9.png").write_bytes(b"mine")  # no report has been written here yet
    write_report("title", result(1), tmp_path)
    assert (tmp_path / "figure9.png").read_bytes() == b"mine"
    (tmp_path / "figure9.png").unlink()
    others = ("figure.png", "figureA.png", "figure-1.png", "my figure2.png", "figure2.svg", "figures.png")
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    write_report("title", result(1), tmp_path)
    assert names(tmp_path) == sorted([*others, "figure1.png", "report.html"])

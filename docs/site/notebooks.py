"""The notebooks as `.ipynb` files, without outputs: `python docs/site/notebooks.py -o out/notebooks` writes them.

In Colab: File, Upload notebook. Each begins with a cell that installs the package where it is missing, as in Colab.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "notebooks"
INSTALL = """\
# Where the package is not installed, as in Colab, a wheel of it is looked for beside this notebook: upload one first.
import importlib.util

if importlib.util.find_spec("qwen_scope") is None:
    %pip install -q qwen_scope-*.whl"""


def notebook(text: str) -> dict[str, Any]:
    """A text in jupytext's percent format as a notebook; its first cell of code installs the package."""
    cells: list[dict[str, Any]] = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cells.append(cell("markdown", "\n".join(lines), len(cells)))
        else:
            if not any(one["cell_type"] == "code" for one in cells):
                cells.append(cell("code", INSTALL, len(cells)))
            cells.append(cell("code", body.strip(), len(cells)))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def cell(kind: str, source: str, number: int) -> dict[str, Any]:
    """A cell as nbformat 4.5 has it."""
    own: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": source.splitlines(True), **own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/notebooks"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(SOURCE.glob("*.py")):
        made = json.dumps(notebook(path.read_text(encoding="utf-8")), ensure_ascii=False, indent=1)
        (out / f"{path.stem}.ipynb").write_text(made + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""A hook of mkdocs: the notebooks as tutorials, each as a page and as a file to download."""

from __future__ import annotations

import json
from typing import Any

from notebooks import SOURCE, notebook

PAGE = "tutorials.md"


def on_files(files: Any, config: Any) -> Any:
    """Add the list, a page for each notebook, and the notebooks themselves."""
    from mkdocs.structure.files import File

    made = {path.stem: notebook(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.glob("*.py"))}
    files.append(File.generated(config, PAGE, content=listed(made)))
    for stem, one in made.items():
        files.append(File.generated(config, f"tutorials/{stem}.md", content=page(stem, one)))
        files.append(File.generated(config, f"tutorials/{stem}.ipynb", content=json.dumps(one, ensure_ascii=False)))
    return files


def listed(made: dict[str, dict[str, Any]]) -> str:
    """Every notebook by its title, and how they are opened."""
    rows = [
        f"| [{title(one)}](tutorials/{stem}.md) | [{stem}.ipynb](tutorials/{stem}.ipynb) |"
        for stem, one in made.items()
    ]
    table = "\n".join(["| tutorial | as a notebook |", "|---|---|", *rows])
    return (
        f"# Tutorials\n\nEach takes a minute or less on the lab, the model in the package.\n\n{table}\n\n"
        "Jupyter opens the files as they are. In Colab choose *File*, *Upload notebook*; the first cell of each\n"
        "installs the package from a wheel that you upload beside it (`python -m build` in a checkout writes one).\n"
    )


def page(stem: str, made: dict[str, Any]) -> str:
    """The cells of a notebook below each other, without the one that installs the package."""
    parts, codes = [], 0
    for cell in made["cells"]:
        source = "".join(cell["source"])
        codes += cell["cell_type"] == "code"
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif codes > 1:
            parts.append(f"```python\n{source}\n```")
    return "\n\n".join([*parts, f"[This page as a notebook]({stem}.ipynb)"]) + "\n"


def title(made: dict[str, Any]) -> str:
    """The heading that a notebook begins with."""
    return "".join(made["cells"][0]["source"]).split("\n")[0].removeprefix("# ")

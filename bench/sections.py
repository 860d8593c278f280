"""Writes what a benchmark printed into its own section of docs/results.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill

RESULTS = Path(__file__).parents[1] / "docs" / "results.md"


def write_section(title: str, body: str, path: Path = RESULTS) -> None:
    """Replace the section `## title`, or append it."""
    head, *sections = path.read_text(encoding="utf-8").split("\n## ")
    made = f"{title}\n\n{body.strip()}\n"
    titles = [section.split("\n", 1)[0] for section in sections]
    if title in titles:
        sections[titles.index(title)] = made
    else:
        sections.append(made)
    path.write_text("\n## ".join([head, *(f"{section.strip()}\n" for section in sections)]), encoding="utf-8")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers with two digits after the point."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def paragraph(text: str) -> str:
    """The words of a text in lines of the docs' width."""
    return fill(" ".join(text.split()), 120)

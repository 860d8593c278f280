"""Sections of docs/results.md: what an experiment found, replaced whole, and what people wrote about it, kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill

RESULTS = Path(__file__).parents[1] / "docs" / "results.md"
BY_HAND = "<!-- by hand: kept when the section is written again -->"
"""What stands below this line in a section was written by a person, who checks it when figures change."""


def write_section(title: str, body: str, path: Path = RESULTS) -> None:
    """Replace the section `## title`, or append it. What stands below `BY_HAND` in the old section stays."""
    head, *sections = path.read_text(encoding="utf-8").split("\n## ")
    titles = [section.split("\n", 1)[0] for section in sections]
    made = f"{title}\n\n{body.strip()}\n"
    if title in titles:
        at = titles.index(title)
        _, mark, remarks = sections[at].partition(BY_HAND)
        sections[at] = f"{made}\n{mark}{remarks}" if mark else made
    else:
        sections.append(made)
    path.write_text("\n## ".join([head, *(f"{section.strip()}\n" for section in sections)]), encoding="utf-8")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; floats with two digits after the point."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def paragraph(text: str) -> str:
    """The words of a text in lines of the docs' width."""
    return fill(" ".join(text.split()), 120)

"""Real text: a fixed excerpt of CPython's standard library and of its documentation strings."""

from __future__ import annotations

from functools import cache
from importlib import resources

from .dice import Dice, share

_BLOCK = 1200
_HELDOUT = 0.08


@cache
def blocks(kind: str) -> tuple[str, ...]:
    """The excerpt of this kind, `code` or `prose`, cut at line ends into blocks of similar length."""
    raw = (resources.files("qwen_scope.lab") / "real" / f"{kind}.txt").read_text(encoding="utf-8")
    found: list[str] = []
    lines: list[str] = []
    size = 0
    for line in raw.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= _BLOCK:
            found.append("".join(lines))
            lines, size = [], 0
    if lines:
        found.append("".join(lines))
    return tuple(found)


@cache
def _of_split(kind: str, train: bool) -> tuple[int, ...]:
    return tuple(i for i, block in enumerate(blocks(kind)) if (share(f"{kind}|{block}") >= _HELDOUT) is train)


def draw_block(kind: str, split: str, dice: Dice) -> tuple[int, str]:
    """The number and text of a block; every hold-out takes the blocks that training never sees."""
    index = dice.pick(_of_split(kind, split == "train"))
    return index, blocks(kind)[index]

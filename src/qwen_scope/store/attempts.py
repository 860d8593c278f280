"""How often a window was begun by processes that died over it: beside the markers, so that whoever comes next knows."""

from __future__ import annotations

from pathlib import Path

from qwen_scope.files import Remote, write_text

from .layout import WORK

TRIES = "tries-"


def begun(folder: Path | Remote, number: int) -> int:
    """Begin a window; how often that was done before without an end."""
    place = _place(folder, number)
    before = int(place.read_text()) if place.is_file() else 0
    write_text(place, str(before + 1))
    return before


def ended(folder: Path | Remote, number: int) -> None:
    """The window has an end, whether good or not."""
    _place(folder, number).unlink(missing_ok=True)


def forget(folder: Path | Remote) -> None:
    """A run that goes on tries every window anew."""
    for place in (folder / WORK).glob(f"{TRIES}*"):
        place.unlink(missing_ok=True)


def _place(folder: Path | Remote, number: int) -> Path | Remote:
    return folder / WORK / f"{TRIES}{number:06d}"

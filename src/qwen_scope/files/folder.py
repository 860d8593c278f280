"""A whole folder as one output: filled beside its place, under its name only when nothing is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_scope.errors import InputError

from .lock import NAME, lock_folder
from .uri import check_here
from .whole import UNFINISHED, sync_folder, told


@contextmanager
def write_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Give a folder to fill beside `path`; it gets that name when the block ends well, and is removed otherwise.

    What a dead writer left is removed first.

    Args:
        path: the output: a new or empty folder.
        replace: the folder may be non-empty; it is then replaced as a whole.

    Raises:
        InputError: it is a file, it is not empty, it can't be written, or another process is about to write it.
    """
    check_here(path)
    target = Path(os.path.realpath(path))
    part = target.with_name(UNFINISHED + target.name)
    before = target.with_name(f"{UNFINISHED}{target.name}.before")
    with told(str(path)):
        _check(target, path, replace)
        with lock_folder(part):
            _clear(part)
            _restore(target, before)
            _check(target, path, replace)
            try:
                yield part
                _sync(part)
                _check(target, path, replace)
                if target.exists() and (os.path.samefile(target, os.getcwd()) or os.path.ismount(target)):
                    _refill(target, part)
                else:
                    if target.exists():
                        shutil.copymode(target, part)
                        os.rename(target, before)
                    os.rename(part, target)
                    (target / NAME).unlink(missing_ok=True)
                sync_folder(target.parent)
            finally:
                _clear(part)
                _restore(target, before)


def _check(target: Path, path: str | os.PathLike[str], replace: bool) -> None:
    if target.exists() and not target.is_dir():
        raise InputError(f"{path} is a file; name a folder")
    if target.is_dir() and not replace and any(target.iterdir()):
        raise InputError(f"{path} is not empty; name a new or empty folder")


def _restore(target: Path, before: Path) -> None:
    """Put the old folder back where the run ended between the two renames; else remove it."""
    if before.exists() and not target.exists():
        os.rename(before, target)
    shutil.rmtree(before, ignore_errors=True)


def _refill(target: Path, part: Path) -> None:
    """The content of one folder in place of another's, where the folder itself has to stay: somebody stands in it."""
    _clear(target)
    for child in part.iterdir():
        if child.name != NAME:
            os.rename(child, target / child.name)


def _clear(folder: Path) -> None:
    if not folder.exists():
        return
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child.name != NAME:
            child.unlink()


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())

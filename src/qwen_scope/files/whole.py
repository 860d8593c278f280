"""One writer for every output: beside its target first, under its name only when it is whole."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen_scope.errors import InputError

UNFINISHED = ".unfinished-"


@contextmanager
def write_whole(path: str | os.PathLike[str], what: str = "") -> Iterator[Path]:
    """Give a file to write beside `path`; it gets that name when the block ends well, and is removed otherwise.

    A link is followed, so what it points to is replaced and the link stays; an existing file keeps its permissions.
    Where `path` is a pipe or a device, such as `/dev/stdout`, there is nothing to rename: the block writes it itself.

    Args:
        path: the output; folders above it are made.
        what: what it is called in an error; default: its path.

    Raises:
        InputError: a folder has that name, it can't be written, or the disk is full.
    """
    target = Path(path)
    named = what or str(path)
    with told(named):
        if target.is_dir():
            raise InputError(f"{named} is a folder; name a file in it")
        if target.exists() and not target.is_file():
            yield target
            return
        target = Path(os.path.realpath(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{UNFINISHED}{os.getpid()}-{uuid.uuid4().hex[:8]}{target.suffix[:20]}")
        try:
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, part)
            os.replace(part, target)
            sync_folder(target.parent)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole, UTF-8, lines ending as they do in `text`.

    Raises:
        InputError: as `write_whole`.
    """
    with write_whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def not_onto_itself(output: str | os.PathLike[str], *inputs: str | os.PathLike[str]) -> None:
    """Refuse an output that is one of the inputs, under whatever name, or lies inside a folder that is read.

    Raises:
        InputError: it is, or does.
    """
    target = Path(os.path.realpath(output))
    for given in inputs:
        source = Path(os.path.realpath(given))
        if not source.exists():
            continue
        same = source == target or (target.exists() and os.path.samefile(source, target))
        if same and stat.S_ISREG(source.stat().st_mode):
            raise InputError(f"{output} is what is read ({given}); name another output")
        if source.is_dir() and (same or source in target.parents):
            raise InputError(f"{output} lies in {given}, which is read; name an output outside of it")


@contextmanager
def told(named: str) -> Iterator[None]:
    """Turn what the system says of an output into one sentence."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"can't write {named}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Put a folder's list of names on the disk itself, where the system lets a folder be opened."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)

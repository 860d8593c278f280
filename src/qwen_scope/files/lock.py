"""One writer for an output folder. The system holds the lock, so it ends with the process that took it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qwen_scope.errors import InputError

from .whole import told

NAME = ".lock"


@contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder as its only writer while the block runs; it is made where it does not exist.

    The file `.lock` in it names the process; it goes when the block ends. Readers take no lock.

    Raises:
        InputError: another process (or another block of this one) writes to it, or it can't be made.
    """
    place = Path(folder)
    with told(str(folder)):
        place.mkdir(parents=True, exist_ok=True)
    with told(str(folder)):
        file = _open(place / NAME)
    if not _take(file, place / NAME):
        holder = file.read(20).decode("ascii", "replace").strip()
        file.close()
        who = f" (process {holder})" if holder.isdigit() else ""
        raise InputError(
            f"another process{who} is writing to {folder}; wait until it has ended, or name another folder"
        )
    try:
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        file.flush()
        yield
    finally:
        # Removed while it is still held: whoever opened it in the meantime finds another file under the name.
        (place / NAME).unlink(missing_ok=True)
        file.close()


def _open(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")


def _take(file: IO[bytes], path: Path) -> bool:
    """Take the lock without waiting; False where another holds it, or has just let go of the file under this name."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, PermissionError, FileNotFoundError):
        return False

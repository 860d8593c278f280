"""One writer for an output folder. The system holds the lock, so it ends with the process that took it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen_scope.errors import InputError

from .uri import check_here
from .whole import make_folder, remove_stale, take, told

NAME = ".lock"


@contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder as its only writer while the block runs; it is made where it does not exist.

    The file `.lock` in it names the process; it goes when the block ends, and with it a folder that was made here and
    is empty. Unfinished files of dead writers are removed, one folder down too. Readers take no lock.

    Raises:
        InputError: another process (or another block of this one) writes to it, or it can't be made.
    """
    check_here(folder)
    place = Path(folder)
    with told(str(folder)):
        made = make_folder(place)
        held = os.open(place / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        if not take(held, place / NAME):
            holder = os.read(held, 20).decode("ascii", "replace").strip()
            os.close(held)
            who = f" (process {holder})" if holder.isdigit() else ""
            raise InputError(
                f"another process{who} is writing to {folder}; wait until it has ended, or name another folder"
            )
    try:
        os.ftruncate(held, 0)
        os.write(held, str(os.getpid()).encode())
        with suppress(OSError):
            for below in (place, *(path for path in place.iterdir() if path.is_dir() and not path.is_symlink())):
                remove_stale(below)
        yield
    finally:
        # Removed while it is still held: whoever opened it in the meantime finds another file under the name.
        with suppress(OSError):
            (place / NAME).unlink(missing_ok=True)
        os.close(held)
        for path in reversed(made):
            with suppress(OSError):
                path.rmdir()

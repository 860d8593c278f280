"""One writer for an output folder. The system holds the lock, so it ends with the process that took it.

At a URI nothing holds a lock. There the last one who comes is the writer, and the one before finds that out and stops.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen_scope.errors import InputError, NotFoundError, QwenScopeError

from .remote import Remote
from .uri import check_here
from .whole import make_folder, remove_stale, take, told

NAME = ".lock"


@contextmanager
def claim_folder(folder: Path | Remote) -> Iterator[Callable[[], None]]:
    """Be a folder's only writer while the block runs, wherever it is.

    What it gives is to be called before anything is taken for finished: at a URI it raises InputError where another
    process has come for the folder since; under `lock_folder` none can.

    Raises:
        InputError: as `lock_folder`.   NotFoundError, InputError: the place can't be written.
    """
    if not isinstance(folder, Remote):
        with lock_folder(folder):
            yield lambda: None
        return
    claim, mine = folder / NAME, uuid.uuid4().hex

    def still() -> None:
        try:
            theirs = claim.read_text()
        except NotFoundError:  # they have come and gone
            theirs = ""
        if theirs != mine:
            raise InputError(
                f"another process has begun to write to {folder}, so this one stops; what both have finished is kept"
            )

    claim.write_text(mine)
    try:
        yield still
    finally:
        with suppress(QwenScopeError):
            still()
            claim.unlink(missing_ok=True)


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

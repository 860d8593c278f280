"""Small files in one call, here or elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .remote import Remote
from .whole import write_whole


def write_text(path: str | os.PathLike[str] | Remote, text: str) -> None:
    """Write a text file whole, UTF-8, lines ending as they do in `text`.

    Args:
        path: of this machine, or a `Remote`, whose name alone does for few outputs: stores.

    Raises:
        InputError: as `write_whole`.   NotFoundError, InputError: as a `Remote` is written.
    """
    if isinstance(path, Remote):
        path.write_text(text)
        return
    with write_whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def remove_folder(folder: Path | Remote) -> None:
    """Remove a folder with all that is in it, as far as that goes; one that is not there is no error."""
    if isinstance(folder, Remote):
        folder.rmtree()
    else:
        shutil.rmtree(folder, ignore_errors=True)

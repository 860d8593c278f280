"""Whether a name is a URI of something elsewhere."""

from __future__ import annotations

import os
import re

from qwen_scope.errors import InputError

# pathlib makes one slash of two, so a URI that went through a `Path` has one.
URI = re.compile(r"(?P<protocol>[a-z][a-z0-9+.\-]+):/{1,3}(?P<rest>[^/].*)", re.DOTALL)


def remote_uri(source: object) -> str | None:
    """The URI of something that is not on this machine, with two slashes; None for a path or a `file:` URI."""
    if not isinstance(source, str | os.PathLike):
        return None
    text = os.fspath(source)
    match = URI.fullmatch(text) if isinstance(text, str) else None
    if match is None or match["protocol"] == "file" or os.path.lexists(text):
        return None
    return f"{match['protocol']}://{match['rest'].rstrip('/')}"


def check_here(output: object) -> None:
    """Refuse an output that is not on this machine.

    Raises:
        InputError: it is named by a URI.
    """
    if (uri := remote_uri(output)) is not None:
        raise InputError(f"{uri} can be read but not written; name a folder or file of this machine and copy it there")

"""The errors this package raises on purpose.

Each message is one sentence that says what came, what fits and, where it helps, what to type next.
The command line prints the message and exits with code 2; anything that is not a `QwenScopeError` is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QwenScopeError(Exception):
    """Base of every error raised on purpose."""


class InputError(QwenScopeError):
    """An argument, a text or a combination of options that does not fit."""


class FormatError(QwenScopeError):
    """A file that is not what its format says it is."""


class NotFoundError(QwenScopeError):
    """A name, a layer or a file that does not exist."""


class MismatchError(QwenScopeError):
    """Two things that do not belong together, such as an SAE and a model of another width."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """A phrase that names the `n` known names closest to `name`, for the end of a `NotFoundError`."""
    known = list(known)
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=n, cutoff=0.4)
    names = [lowered[c] for c in close] or sorted(known)[:n]
    return "did you mean " + " or ".join(repr(name) for name in names) + "?"

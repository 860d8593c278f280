"""The errors this package raises on purpose.

Each message is one sentence that says what came, what fits and, where it helps, what to type next.
The command line prints the message and exits with code 2; anything that is not a `QwenScopeError` is a bug.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

REASON = 300  # characters of a foreign error's own words that a sentence repeats


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


class QwenScopeWarning(UserWarning):
    """Something a user should know although the work goes on; the command line prints it as one line."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """A phrase that names the `n` known names closest to `name`, for the end of a `NotFoundError`."""
    known = list(known)
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=n, cutoff=0.4)
    names = [lowered[c] for c in close] or sorted(known)[:n]
    return "did you mean " + " or ".join(repr(name) for name in names) + "?"


@contextmanager
def foreign(what: str, kind: type[QwenScopeError] = FormatError, hint: str = "") -> Iterator[None]:
    """A boundary around a call into someone else's code: whatever it raises becomes one sentence.

    Our own errors pass through, as do an interrupt and a reader of our output that has gone.

    Args:
        what: the start of the sentence, such as "the tokenizer of FOLDER can't be loaded".
        kind: the error that it becomes.
        hint: what to type next, the end of the sentence.

    Raises:
        QwenScopeError: of that `kind`, "WHAT: reason; HINT".
    """
    try:
        yield
    except (QwenScopeError, BrokenPipeError):
        raise
    except Exception as error:
        raise kind(f"{what}: {reason(error)}" + (f"; {hint}" if hint else "")) from error


def reason(error: BaseException) -> str:
    """The first line of an error's own words, cut to a readable length; its type where it has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, KeyError) and words:
        words = f"{words} is missing"
    words = words or type(error).__name__
    return words if len(words) <= REASON else words[: REASON - 1] + "…"


def printable(text: str, keep: str = "") -> str:
    """Text from outside as it may be shown in a terminal: what steers the terminal or hides the order of the
    letters is escaped as in a Python string (`\\x1b`, `\\u202e`), everything else is unchanged.

    Escaped are control characters (Cc), lone surrogates, line and paragraph separators, and the embeddings,
    overrides and isolates of bidirectional text (Unicode Standard Annex 9).

    Args:
        keep: characters that are let through, such as a newline in a text of several lines.
    """
    if text.isprintable():  # the usual case; it excludes all of the above
        return text
    return "".join(char if char in keep or not _steers(char) else _escape(char) for char in text)


def _steers(char: str) -> bool:
    return unicodedata.category(char) in {"Cc", "Cs", "Zl", "Zp"} or char in _BIDI


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

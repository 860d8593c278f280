"""The errors that this package raises on purpose.

Each message is one sentence: what was given, what is accepted and, where it helps, what to type next.
The command line prints the message and exits with code 2; anything that is not a `QwenScopeError` is a bug.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
import re
import reprlib
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

REASON = 300  # how much of another library's error message is quoted, in characters


class QwenScopeError(Exception):
    """Base of every error raised on purpose."""


class InputError(QwenScopeError):
    """An argument, a text or a combination of options that is not accepted."""


class FormatError(QwenScopeError):
    """A file that does not follow its format."""


class NotFoundError(QwenScopeError):
    """A name, a layer or a file that does not exist."""


class MismatchError(QwenScopeError):
    """Two things that do not match, such as an SAE and a model of another width."""


def plain(error: QwenScopeError) -> tuple[str, str]:
    """Its kind and its sentence: an error passed on to another process as an object could lose its kind."""
    return type(error).__name__, str(error)


def loaded(kind: str, sentence: str) -> QwenScopeError:
    """The error that `plain` told of; one of a kind that is not in this file is an `InputError`."""
    known = globals().get(kind)
    return (known if isinstance(known, type) and issubclass(known, QwenScopeError) else InputError)(sentence)


class QwenScopeWarning(UserWarning):
    """Something a user should know while the work continues; the command line prints it as one line."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """A phrase that names the `n` known names closest to `name`, for the end of a `NotFoundError`."""
    known = list(known)
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=n, cutoff=0.4)
    names = [lowered[c] for c in close] or sorted(known)[:n]
    return "did you mean " + " or ".join(repr(name) for name in names) + "?"


def check_count(
    what: str, value: Any, least: int = 1, most: int | None = None, *, kind: type[QwenScopeError] = InputError
) -> int:
    """A whole number in a range, as a Python int; NumPy integers are accepted, booleans and 3.0 are not.

    Raises:
        QwenScopeError: of that `kind`: it is not, or it is out of range.
    """
    whole = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
    if whole is None or whole < least or (most is not None and whole > most):
        fits = f"of at least {least}" if most is None or most >= 2**31 else f"between {least} and {most}"
        raise kind(f"{what} must be a whole number {fits}; got {brief(value)}")
    return whole


def check_number(
    what: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    kind: type[QwenScopeError] = InputError,
) -> float:
    """A finite number in a range, as a Python float; NaN, infinities and booleans are refused.

    Raises:
        QwenScopeError: of that `kind`: it is not, or it is out of range.
    """
    real = float(value) if isinstance(value, numbers.Real) and _finite(value) and not isinstance(value, bool) else None
    if real is None or not least <= real <= most:
        fits = {(True, False): f" of at least {least:g}", (False, True): f" of at most {most:g}"}.get(
            (least > -math.inf, most < math.inf), f" between {least:g} and {most:g}" if least > -math.inf else ""
        )
        raise kind(f"{what} must be a finite number{fits}; got {brief(value)}")
    return real


def check_positive(what: str, value: Any) -> float:
    """A finite number above zero, as a Python float.

    Raises:
        InputError: it is not.
    """
    if not (real := check_number(what, value, 0)):
        raise InputError(f"{what} must be greater than 0; got {brief(value)}")
    return real


def check_share(what: str, value: Any, *, zero: bool = False, one: bool = True) -> float:
    """A fraction in (0, 1], as a Python float.

    Args:
        zero, one: whether 0 and 1 are allowed.

    Raises:
        InputError: it is not.
    """
    real = check_number(what, value, 0, 1)
    if (not zero and real == 0) or (not one and real == 1):
        fits = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise InputError(f"{what} must be in {fits}; got {brief(value)}")
    return real


def check_name(what: str, value: Any) -> str:
    """A name that becomes that of a file or folder: one plain part of a path, such as `SAE-Res-Tiny-W1K-L0_8`.

    Raises:
        InputError: it holds a separator, a control character, or half a surrogate pair, begins with a dot, begins or
            ends with a space, or is empty or longer than file systems allow.
    """
    text = value if isinstance(value, str) else ""
    plain = bool(text) and text == text.strip() and not text.startswith(".") and not set(text) & set("/\\:")
    if not plain or any(_steers(char) for char in text) or len(text.encode()) > 200:
        raise InputError(
            f"{what} names one file or folder, without / \\ : and not beginning with a dot; got {brief(value)}"
        )
    return text


def brief(value: Any) -> str:
    """A short representation of a value for an error message; nested content is not expanded."""
    shown = _BRIEF.repr(value)
    return shown if len(shown) <= 60 else shown[:59] + "…"


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of a float
        return False


class _Brief(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 64 else f"a whole number of {x.bit_length()} bits"


_BRIEF = _Brief()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 1, 56, 56


def need(what: str, *packages: str) -> None:
    """Raise unless the packages of an optional extra are installed.

    Raises:
        NotFoundError: "WHAT needs the package NAME; install it with: PYTHON -m pip install 'NAME>=1'".
    """
    if missing := [name for name in packages if find_spec(name) is None]:
        raise NotFoundError(absent(what, *missing))


def absent(what: str, *packages: str) -> str:
    """The message for packages that are not installed, given their import names."""
    names = [_PROJECTS.get(name, name) for name in packages]
    which, it = (f"package {names[0]}", "it") if len(names) == 1 else (f"packages {', '.join(names)}", "them")
    return f"{what} needs the {which}; install {it} with: {install_line(*names)}"


def install_line(*packages: str) -> str:
    """The command that installs packages into this environment, from a checkout or a wheel of qwen-scope.

    It names the packages in the versions that our extras require: qwen-scope is not on PyPI, so its extras can be named
    only where its source is.
    """
    from importlib import metadata  # takes 10 ms, needed for this message alone

    try:
        asked = [line.partition(";")[0].strip() for line in metadata.requires("qwen-scope") or ()]
    except metadata.PackageNotFoundError:  # the source alone, on PYTHONPATH
        asked = []
    known = {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower(): line for line in asked}
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd() + os.sep) else sys.executable
    return shlex.join([python, "-m", "pip", "install", *(known.get(name.lower(), name) for name in packages)])


# The name on the package index, where it is not the one that is imported.
_PROJECTS = {"sklearn": "scikit-learn", "yaml": "pyyaml"}


@contextmanager
def foreign(what: str, kind: type[QwenScopeError] = FormatError, hint: str = "") -> Iterator[None]:
    """A boundary around a call into another library: whatever it raises becomes one of our errors.

    Our own errors pass through, as do interrupts and broken pipes.

    Args:
        what: the start of the message, such as "the tokenizer of FOLDER can't be loaded".
        kind: the error raised instead.
        hint: what to type next; ends the message.

    Raises:
        QwenScopeError: of that `kind`, "WHAT: reason; HINT".
    """
    try:
        yield
    except (QwenScopeError, BrokenPipeError):
        raise
    except BaseException as error:
        # A panic in a Rust library (tokenizers) does not derive from Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = f"{reason(error).rstrip('.')}; {hint}" if hint else reason(error)
        raise kind(f"{what}: {why}") from error


def reason(error: BaseException) -> str:
    """The first line of an error's message, truncated, with the next where it ends in a colon; its type if it has no
    message.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("qwen_scope"):
        return absent("it", error.name.partition(".")[0])
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    words = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    if isinstance(error, KeyError) and words:
        words = f"{words} is missing"
    words = words or type(error).__name__
    return words if len(words) <= REASON else words[: REASON - 1] + "…"


def printable(text: str, keep: str = "") -> str:
    """Text from outside, safe to print in a terminal: characters that control the terminal or the direction of text
    are escaped as in a Python string (`\\x1b`, `\\u202e`).

    Escaped are control characters (Cc), lone surrogates, line and paragraph separators, and the embeddings,
    overrides and isolates of bidirectional text (Unicode Standard Annex 9).

    Args:
        keep: characters that are not escaped, such as newlines in multi-line text.
    """
    if text.isprintable():  # the usual case; it excludes all of the above
        return text
    return "".join(char if char in keep or not _steers(char) else _escape(char) for char in text)


def _steers(char: str) -> bool:
    return unicodedata.category(char) in {"Cc", "Cs", "Zl", "Zp"} or char in _BIDI


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

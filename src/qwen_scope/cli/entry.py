"""Where a run of the command line begins and ends: whatever happens inside, one sentence and an exit code come out.

Nothing heavy is imported here: an interrupt while the commands are still being imported ends in one sentence as well.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from qwen_scope.errors import InputError, QwenScopeError, QwenScopeWarning, absent, brief, printable, reason

from .once import said_elsewhere

# Exit codes. 2 is what a usage error gives; 70 is EX_SOFTWARE of sysexits.h, 128 and a signal's number is the shell's.
REFUSED, GONE, BUG, INTERRUPTED = 2, 1, 70, 130

DEBUG = "QWEN_SCOPE_DEBUG"

# New objects between two looks for unreachable cycles, where Python has 700. Importing torch and transformers makes a
# million objects that stay, and looking through them takes a tenth of the time that a short command takes.
OBJECTS_BETWEEN_COLLECTIONS = 20_000

# Libraries that report on their own doings at length; a user who wants to read it sets these otherwise.
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 when it went well, 2 with one sentence on standard error when something that was given does not fit or the
    machine refuses; 1 when whoever read the output has gone; 130 after an interrupt; 70 for a bug of ours. With
    `QWEN_SCOPE_DEBUG=1` in the environment, a bug shows its traceback instead.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    open_streams()
    if argv is None:  # else the process is somebody else's
        gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    with ended_by_signals() as ended, told_warnings(), told_notes():
        try:
            code = run(argv)
            if ended:  # the code of a library ran into the signal and made something else of it
                raise KeyboardInterrupt
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            return stopped(ended, own_process=argv is None)
        except BrokenPipeError:
            discard_output()
            return GONE
        except Exception as error:
            if ended:  # what a library raises where a signal came while it was at work, such as a failed import
                return stopped(ended, own_process=argv is None)
            code, sentence = explained(error)
            if code == BUG and os.environ.get(DEBUG):
                raise
            say(sentence)
            discard_output()
            return code


def run(argv: Sequence[str] | None) -> int:
    """Run one command; what its options and the library raise comes out, but for the messages on usage."""
    from typer import Abort, BadParameter

    from . import output
    from .app import app
    from .spellings import respelled

    # click's ClickException; which click it is depends on the version of typer
    usage: Any = next(kind for kind in BadParameter.__mro__ if kind.__name__ == "ClickException")
    check_words(sys.argv[1:] if argv is None else argv)
    try:
        with output.command():
            code = app(args=respelled(sys.argv[1:] if argv is None else argv), standalone_mode=False)
    except usage as error:
        text = io.StringIO()
        error.show(text)
        if not said_elsewhere(text.getvalue()):
            write(printable(text.getvalue(), keep="\n"))
        return error.exit_code
    except Abort as abort:
        if isinstance(abort.__context__, EOFError):  # typer takes a file that ends too early for an end of the dialogue
            raise abort.__context__ from None
        raise KeyboardInterrupt from None
    except SystemExit as end:
        if isinstance(end.code, str):
            say(end.code)
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    if code == INTERRUPTED:  # what typer makes of an interrupt
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def check_words(words: Sequence[str]) -> None:
    """Refuse arguments that are no Unicode: Python passes on bytes that it could not read as halves of surrogate pairs.

    Raises:
        InputError: it says whether the argument or the locale is at fault.
    """
    for word in words:
        if word.isascii() or not any("\ud800" <= char <= "\udfff" for char in word):
            continue
        try:
            meant = os.fsencode(word).decode()
        except UnicodeError:
            raise InputError(f"the argument {brief(word)} is not UTF-8: type it anew, or rename the file") from None
        raise InputError(
            f"the argument {brief(meant)} is UTF-8, and this locale reads {sys.getfilesystemencoding()}:"
            " set PYTHONUTF8=1, or a locale such as LC_ALL=C.UTF-8"
        )


def explained(error: Exception) -> tuple[int, str]:
    """The exit code and the sentence for what a command raised."""
    if isinstance(error, QwenScopeError):
        return REFUSED, str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("qwen_scope"):
        return REFUSED, absent("this command", error.name.partition(".")[0])
    if isinstance(error, ImportError) and not (error.name or "").startswith("qwen_scope"):
        return REFUSED, f"a package that this command needs can't be imported: {reason(error)}"
    if isinstance(error, OSError):
        at = f"{error.filename}: " if error.filename else ""
        return REFUSED, f"{at}{reason(error)}"
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return REFUSED, f"not enough memory: {reason(error)}" if str(error) else "not enough memory"
    if isinstance(error, EOFError):
        return REFUSED, f"a file that was given ends too early: {reason(error)}"
    if isinstance(error, RecursionError):
        return REFUSED, f"something that was given is {reason(error)}"
    return BUG, (
        f"{type(error).__name__}: {reason(error)}; this is a bug in qwen-scope: with {DEBUG}=1 in the environment the"
        " same command shows where"
    )


def say(sentence: str) -> None:
    """One sentence on standard error."""
    if not said_elsewhere(sentence):
        write(f"qwen-scope: {printable(sentence)}\n")


def write(text: str) -> None:
    """Text on standard error, if there is still somebody who reads it."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def open_streams() -> None:
    """Make standard input, output and error usable whatever the shell did to them.

    A stream that is closed is opened on the null device, so that no file of ours gets its number, and a character that
    the terminal's encoding lacks is escaped. Where the locale says no encoding, what is piped is read as UTF-8.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            with suppress(OSError):
                os.fstat(number)
                continue  # Python was started without it, the number is taken
            opened = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors == "surrogateescape":  # the locale C, or POSIX
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Send what standard output still holds nowhere, where it can't be written; else the interpreter complains."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


def stopped(ended: Sequence[int], own_process: bool) -> int:
    """The exit code of a run that a signal ended, after saying so where somebody may be reading."""
    number = ended[0] if ended else signal.SIGINT
    if own_process:  # threads may still be at work; asked a second time, the process ends without waiting for them
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if number == signal.SIGINT:
        say("interrupted")
    discard_output()
    return 128 + number


@contextmanager
def ended_by_signals() -> Iterator[list[int]]:
    """Let an interrupt, a closed terminal or a request to end unwind the run, so that half-written files are removed.

    Yields the numbers of the signals that came. One that the shell ignores (nohup) stays ignored, and the workers of
    torchrun leave a request to end to the system: they may be waiting for one another.
    """
    ended: list[int] = []
    before: dict[int, Any] = {}
    done = False

    def end(number: int, frame: FrameType | None) -> None:
        if not done:  # else the run is over, and there is nothing to unwind
            ended.append(number)
            raise KeyboardInterrupt

    names = ("SIGINT", "SIGHUP") if "WORLD_SIZE" in os.environ else ("SIGINT", "SIGHUP", "SIGTERM")
    for name in names:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            with suppress(ValueError):  # only the main thread may set one
                before[number] = signal.signal(number, end)
    try:
        yield ended
    finally:
        done = True
        for number, handler in before.items():
            if signal.getsignal(number) is end:
                signal.signal(number, handler)


@contextmanager
def told_warnings() -> Iterator[None]:
    """Print our own warnings as a line each, and leave out those of the libraries below us."""
    shown: Callable[..., None] = warnings.showwarning

    def tell(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        if issubclass(category, QwenScopeWarning):
            say(str(message))
        elif os.environ.get(DEBUG):
            shown(message, category, filename, lineno, *rest)

    warnings.showwarning = tell
    try:
        yield
    finally:
        warnings.showwarning = shown


class Teller(logging.Handler):
    """Prints what the library logs as a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextmanager
def told_notes() -> Iterator[None]:
    """Print what the library has to say that is no warning, such as a remembered verdict."""
    log, teller = logging.getLogger("qwen_scope"), Teller(logging.INFO)
    level = log.level
    log.addHandler(teller)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(teller)
        log.setLevel(level)

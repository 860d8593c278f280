"""Append-only files of JSON lines, read and continued although a writer may have died in the middle of one.

A line ends at "\\n" alone: a text may hold U+2028 or U+0085, which `str.splitlines` takes for ends.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import IO

from qwen_scope.errors import FormatError, InputError, QwenScopeWarning, foreign

from .remote import Remote, place
from .whole import told

BLOCK = 1 << 16  # bytes read at a time from the end of a file


def read_lines(path: str | os.PathLike[str] | Remote) -> list[str]:
    """The lines of such a file, without their ends; none where there is no file. Empty lines are left out.

    A last line without its end that is no whole JSON value was torn when its writer died: it is left out, with a
    `QwenScopeWarning`.

    Raises:
        FormatError: bytes that are not UTF-8 before the last line, or a file that can't be read.
    """
    at = place(path)
    with foreign(f"{path} can't be read"):
        data = at.read_bytes() if at.exists() else b""
    kept, torn = _split(data)
    if torn:
        warnings.warn(f"the last line of {path} is torn ({len(torn)} bytes); it is left out", QwenScopeWarning, 2)
    try:
        text = kept.decode("utf-8")
    except UnicodeDecodeError as error:
        line = kept[: error.start].count(b"\n") + 1
        raise FormatError(f"line {line} of {path} is not UTF-8") from error
    return [line for line in text.split("\n") if line.strip()]


def text_lines(text: str) -> list[str]:
    """The lines of a text, without their ends, `\\n` or `\\r\\n`; blank ones are left out."""
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def append_lines(path: str | os.PathLike[str] | Remote, lines: Iterable[str]) -> None:
    """Add lines, each without its end, in one write that is on the disk when this returns.

    A torn last line is cut off first. Where the write fails, the file is as it was before. Of several writers one
    waits for the other.

    Raises:
        InputError: it can't be written, or the disk is full.
    """
    data = "".join(line + "\n" for line in lines).encode("utf-8")
    at = place(path)
    if isinstance(at, Remote):
        raise InputError(f"{at} can't be added to, because what lies at a URI is only read; copy its folder here")
    with told(str(path)), at.open("a+b", buffering=0) as file:
        _wait_for(file)
        length = _mend(file)
        try:
            _write(file, data)
        except BaseException:
            os.ftruncate(file.fileno(), length)
            raise


def _wait_for(file: IO[bytes]) -> None:
    """Hold the file until it is closed: what one writer mends or takes back is no line of another."""
    if os.name == "posix":
        import fcntl

        with suppress(OSError):  # a file system without locks
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)


def _write(file: IO[bytes], data: bytes) -> None:
    done = 0
    while done < len(data):
        done += os.write(file.fileno(), data[done:])
    os.fsync(file.fileno())


def _mend(file: IO[bytes]) -> int:
    """Make a file end with a whole line; its length then."""
    length = file.seek(0, os.SEEK_END)
    last = b""
    start = length
    while start and b"\n" not in last:
        begin = max(0, start - BLOCK)
        file.seek(begin)
        last = file.read(start - begin) + last
        start = begin
    _, torn = _split(last)
    if torn:
        os.ftruncate(file.fileno(), length - len(torn))
        return length - len(torn)
    if last and not last.endswith(b"\n"):
        _write(file, b"\n")
        return length + 1
    return length


def _split(data: bytes) -> tuple[bytes, bytes]:
    """What is whole, and the torn rest of a last line."""
    end = data.rfind(b"\n") + 1
    last = data[end:]
    if not last.strip():
        return data[:end], b""
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        return data[:end], last
    return data, b""

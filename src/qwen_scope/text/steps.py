"""A limit on the steps of foreign Python code, such as a chat template that loops within loops."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from qwen_scope.errors import InputError

TEMPLATE = "<template>"
"""The file name that Jinja gives to the code it compiles a template to."""


class TooManySteps(InputError):
    """A template ran for longer than any conversation needs."""


@contextmanager
def at_most(steps: int, what: str) -> Iterator[None]:
    """Stop templates that are rendered inside after this many lines of compiled code, in this thread.

    Jinja's sandbox bounds one `range`, and not loops within loops. Counting lines is the same on every machine, and the
    code under a debugger or a measurement of coverage is traced by it again afterwards.

    Args:
        what: the beginning of the error.

    Raises:
        TooManySteps: there were more.
    """
    lines = _Lines(steps, what)
    before = sys.gettrace()
    sys.settrace(lines.call)
    try:
        yield
    finally:
        sys.settrace(before)


class _Lines:
    """Counts the lines that templates run."""

    def __init__(self, steps: int, what: str) -> None:
        self.steps, self.left, self.what = steps, steps, what

    def call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self.line if frame.f_code.co_filename == TEMPLATE else None

    def line(self, frame: FrameType, event: str, arg: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise TooManySteps(
                f"{self.what} in {self.steps:,} steps: a loop in it may not end; read the texts without a chat"
                " template, or give the tokenizer another one"
            )
        return self.line

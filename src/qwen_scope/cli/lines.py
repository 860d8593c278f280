"""Progress where nobody watches: plain lines on standard error, for a log file or a pipe."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from qwen_scope.errors import printable

INTERVAL = 30.0  # seconds between lines


class Job:
    """What a job does at the moment, as a line: stage, share, text, time spent and time to go.

    Args:
        stage: what it does until it reports something else.
        clock: seconds, from wherever.
    """

    def __init__(self, stage: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self.stage, self.text, self.clock = stage, "", clock
        self.start = clock()
        self.share: float | None = None
        self.first: tuple[float, float] | None = None  # when a stage was first heard of, and its share then

    def report(self, stage: str, share: float, text: str) -> None:
        """Take note; nothing is written."""
        if stage != self.stage or self.first is None:
            self.first = self.clock(), share
        self.stage, self.share, self.text = stage, share, text

    def line(self, done: bool = False) -> str:
        """The line of this moment, or the last one."""
        share = "" if self.share is None else f"{1.0 if done else self.share:.0%}"
        spent = duration(self.clock() - self.start)
        times = f"done after {spent}" if done else f"{spent} so far{self.left()}"
        return printable("  ".join(part for part in (self.stage, share, self.text, times) if part))

    def left(self) -> str:
        """How long the stage will take at the speed it has had, where that can be said."""
        if self.first is None or self.share is None or self.share <= self.first[1]:
            return ""
        begin, share = self.first
        return f", about {duration((self.clock() - begin) * (1 - self.share) / (self.share - share))} to go"


def duration(seconds: float) -> str:
    """Seconds as H:MM:SS."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


@contextmanager
def lines(stage: str = "") -> Iterator[Callable[[str, float, str], None]]:
    """Write a job's line every `INTERVAL` seconds, whether it reports or not, and a last one when it ends well.

    A job that is over before the first line writes none.
    """
    job, over, interval = Job(stage), threading.Event(), INTERVAL
    written = False

    def write(done: bool = False) -> None:
        nonlocal written
        written = True
        with suppress(OSError, ValueError):  # whoever read standard error has gone, and the job goes on
            sys.stderr.write(job.line(done) + "\n")
            sys.stderr.flush()

    def watch() -> None:
        while not over.wait(interval):
            write()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield job.report
    finally:
        over.set()
        thread.join()
    if written:
        write(done=True)

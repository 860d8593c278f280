"""Long work of one visitor: it tells how far it is, and can be stopped."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeVar

from qwen_scope.report import Progress

GLANCE = 0.2
"""Seconds between two looks at whether work that says nothing is to stop."""

T = TypeVar("T")


class Told(NamedTuple):
    """How far a piece of work is: the stage, the share of it that is done, and a remark."""

    stage: str
    share: float
    text: str


class Stopped(BaseException):
    """The visitor has pressed Stop, or has gone; unwinds the work."""


class Jobs:
    """Who is at work, by visitor: a new piece of work takes the place of an old one."""

    def __init__(self) -> None:
        self._stops: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def start(self, visitor: str) -> threading.Event:
        """The event that is set when this visitor's work is to end."""
        with self._lock:
            if (old := self._stops.get(visitor)) is not None:
                old.set()
            made = self._stops[visitor] = threading.Event()
            return made

    def end(self, visitor: str, stop: threading.Event) -> None:
        """The work is done; a newer one stays."""
        with self._lock:
            if self._stops.get(visitor) is stop:
                del self._stops[visitor]

    @contextmanager
    def at_work(self, visitor: str) -> Iterator[threading.Event]:
        """Until the end of the block, `stop` sets the event for this visitor."""
        stop = self.start(visitor)
        try:
            yield stop
        finally:
            stop.set()
            self.end(visitor, stop)

    def stop(self, visitor: str) -> None:
        """End what this visitor has at work, if anything."""
        with self._lock:
            if (found := self._stops.get(visitor)) is not None:
                found.set()

    @property
    def running(self) -> int:
        """How many visitors have work going on."""
        return len(self._stops)


def watched(work: Callable[[Progress], T], stop: threading.Event) -> Iterator[Told | T]:
    """Runs `work` in a thread of its own and gives its progress, then its result.

    Where the event is set, or the iterator closed, the work ends when it next tells its progress, without a
    result; until then it is told that the work is stopping.
    """
    reports: queue.Queue[Told | None] = queue.Queue()
    done: list[T] = []

    def progress(stage: str, share: float, text: str) -> None:
        if stop.is_set():
            raise Stopped
        reports.put(Told(stage, share, text))

    def run() -> None:
        try:
            with suppress(Stopped):
                done.append(work(progress))
        finally:
            reports.put(None)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        share, said = 0.0, False
        try:
            while True:
                try:
                    told = reports.get(timeout=GLANCE)
                except queue.Empty:
                    if stop.is_set() and not said:
                        said = True
                        yield Told("stopping", share, "at the end of this step")
                    continue
                if told is None:
                    break
                share = told.share
                yield told
        finally:
            stop.set()
        running.result()
    yield from done

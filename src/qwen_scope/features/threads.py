"""Questions in threads that nobody waits for: an interrupt or an error ends the asking at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar, final

T = TypeVar("T")

HEARD = 0.25  # seconds until an interrupt is heard that the system gave to another thread


@final
class Threads:
    """At most `n` calls at a time, each in a thread; when the block ends, what has not begun by then never does.

    The threads are daemons: unlike those of `ThreadPoolExecutor`, neither the end of the block nor that of the
    interpreter waits for a request under way.
    """

    def __init__(self, n: int) -> None:
        self.n, self._waiting, self._threads = n, queue.SimpleQueue[Any](), list[threading.Thread]()
        self._ended = False

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for _thread in self._threads:
            self._waiting.put(None)

    def submit(self, call: Callable[..., T], *args: Any) -> Future[T]:
        """Begin a call as soon as a thread is free."""
        task: Future[T] = Future()
        self._waiting.put((task, call, args))
        if len(self._threads) < self.n:
            self._threads.append(threading.Thread(target=self._work, daemon=True))
            self._threads[-1].start()
        return task

    def result(self, task: Future[T]) -> T:
        """What a call returned, or the error it raised.

        A thread that waits for a lock is woken by a signal only where the system delivers it to that thread, so the
        wait is in short pieces.
        """
        while not task.done():
            wait([task], HEARD)
        return task.result()

    def _work(self) -> None:
        while (one := self._waiting.get()) is not None:
            task, call, args = one
            if self._ended or not task.set_running_or_notify_cancel():
                task.cancel()
                continue
            with _Told(task):
                task.set_result(call(*args))


class _Told:
    """Hands an error to a task, which raises it where its result is asked for."""

    def __init__(self, task: Future[Any]) -> None:
        self.task = task

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is not None:
            self.task.set_exception(error)
        return True

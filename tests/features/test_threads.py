"""Calls in threads: an interrupt ends the wait for them, whichever thread the system delivers it to."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from qwen_scope.features import Threads

SLOW = 10.0
"""Seconds that a call takes."""


def test_an_interrupt_that_reaches_another_thread_ends_the_wait() -> None:
    over = threading.Event()

    def strike() -> None:
        time.sleep(0.2)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    begun = time.monotonic()
    with Threads(1) as threads:
        task = threads.submit(over.wait, SLOW)
        threading.Thread(target=strike, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            threads.result(task)
    over.set()
    assert time.monotonic() - begun < SLOW / 2


def test_an_answer_and_an_error_come_out() -> None:
    with Threads(2) as threads:
        tasks = [threads.submit(int, text) for text in ("3", "three")]
        assert threads.result(tasks[0]) == 3
        with pytest.raises(ValueError, match="three"):
            threads.result(tasks[1])

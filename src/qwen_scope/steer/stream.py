"""Generation as an iterator of pieces of text."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from .generate import Generation, OnText


class _Closed(BaseException):
    """The reader has gone; unwinds `generate` and with it every hook."""


def stream(run: Callable[[OnText], list[Generation]]) -> Iterator[tuple[int, str]]:
    """Pieces of text as they are generated, as pairs of the number of the prompt and the piece.

    Args:
        run: calls `generate` with the `on_text` it is given, such as
            `lambda on_text: generate(model, tokenizer, ["Once"], on_text=on_text)`.

    It runs in a thread of its own, in this context. An iterator that is closed early stops the generation.

    Raises:
        whatever `run` raises, where the next piece would have come.
    """
    pieces: queue.Queue[tuple[int, str] | None] = queue.Queue()
    closed = threading.Event()

    def on_text(row: int, piece: str) -> None:
        if closed.is_set():
            raise _Closed
        pieces.put((row, piece))

    def work() -> None:
        try:
            with suppress(_Closed):
                run(on_text)
        finally:
            pieces.put(None)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(contextvars.copy_context().run, work)
        try:
            while (piece := pieces.get()) is not None:
                yield piece
        finally:
            closed.set()
        done.result()

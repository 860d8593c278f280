"""What a request is doing right now, told to the visitor who waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import ContextVar, copy_context
from typing import NamedTuple, TypeVar

PATIENCE = 0.3
"""Seconds after which a visitor is told what takes so long."""

T = TypeVar("T")

_TELL: ContextVar[Callable[[str], None] | None] = ContextVar("tell", default=None)


class Waiting(NamedTuple):
    """What is being done, and for how many seconds."""

    words: str
    seconds: int


def stage(words: str) -> None:
    """Say what is done next, such as `loading the SAE of layer 3`; nothing happens where nobody waits for it."""
    if (tell := _TELL.get()) is not None:
        tell(words)


def patiently(steps: Iterator[T], words: str) -> Iterator[T | Waiting]:
    """The steps of a piece of work; while one takes long, what it is doing, anew with each stage and each second.

    The steps run in a thread of their own.

    Args:
        words: what is said until the work names a stage.
    """
    said, done = [words], object()
    context = copy_context()
    context.run(_TELL.set, lambda now: said.__setitem__(0, now))
    started, told = time.monotonic(), None
    with ThreadPoolExecutor(1) as pool:
        coming = None
        try:
            while True:
                coming = pool.submit(context.run, next, steps, done)
                while not wait([coming], PATIENCE).done:
                    now = Waiting(said[0], int(time.monotonic() - started))
                    if now != told:
                        told = now
                        yield now
                if (found := coming.result()) is done:
                    return
                yield found  # pyright: ignore[reportReturnType]
        finally:
            wait([coming] if coming is not None else [])
            if (close := getattr(steps, "close", None)) is not None:
                close()

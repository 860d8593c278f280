"""Prefetch the next SAE while the current one encodes, and the next residuals while the last are used."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from qwen_scope.sae import SAE

T = TypeVar("T")
_END = object()


def in_turn(saes: Mapping[int, SAE], device: torch.device | str | None = None) -> Iterator[tuple[int, SAE]]:
    """Each layer's SAE on `device`, one after the other, the next one fetched while the one before is at work.

    At most two are on the device at a time, if the caller lets go of each before it asks for the next. Memory-mapped
    SAEs of a whole model can be swept this way. With `device` None they are taken as and where they are.
    """

    on_cuda = device is not None and torch.device(device).type == "cuda"
    # One stream for all copies: they do not wait for the encoding that is under way, and reuse each other's memory.
    stream = torch.cuda.Stream(device) if on_cuda else None

    def fetch(layer: int) -> SAE:
        if device is None:
            return saes[layer]
        with torch.cuda.stream(stream):  # does nothing where there is none
            # A new object, so that what encoding keeps beside the weights goes when its turn is over.
            moved = saes[layer].to(device)
        if stream is not None:
            stream.synchronize()
        return moved

    layers = sorted(saes)
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(fetch, layers[0])] if layers else []
        for i, layer in enumerate(layers):
            sae = coming.pop().result()
            if i + 1 < len(layers):
                coming.append(pool.submit(fetch, layers[i + 1]))
            yield layer, sae
            del sae


@contextlib.contextmanager
def ahead(items: Iterable[T], pays: Callable[[], bool] = lambda: True) -> Iterator[Iterator[T]]:
    """Iterate over `items` with the next one being made in a thread while the last one is used.

    The thread works in a copy of the caller's context. Where it does not pay, it is plain iteration.
    """
    if not pays():
        yield iter(items)
        return
    source = iter(items)
    context = contextvars.copy_context()
    with ThreadPoolExecutor(1) as pool:

        def following() -> Iterator[T]:
            coming = pool.submit(context.run, next, source, _END)
            while (item := coming.result()) is not _END:
                coming = pool.submit(context.run, next, source, _END)
                yield item  # pyright: ignore[reportReturnType]  # the end is not an item

        yield following()

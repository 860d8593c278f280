"""What the steer room's tests share: the tiny scope, and hooks written out by hand as oracles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import tiny
import torch

from qwen_scope import Scope, load_scope


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def scope() -> Scope:
    return load_scope(tiny.folder() / "model", tiny.folder() / "sae", device="cpu")


@pytest.fixture
def by_hand() -> Callable:
    """`with by_hand(block, change)`: `change(h)` at the output of a block, by a plain forward hook."""

    @contextmanager
    def hooked(block: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        def hook(module, args, output):
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        handle = block.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    return hooked

"""Workers of a command: what reads its documents elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from qwen_scope.cluster import WorkerOptions
from qwen_scope.errors import InputError
from qwen_scope.scope import ScopeOptions

if TYPE_CHECKING:
    from qwen_scope.cluster import RayRunner
    from qwen_scope.scope import Runner
    from qwen_scope.train import Mode

WORKERS = WorkerOptions()


def runner_of(spread: WorkerOptions, asked: ScopeOptions) -> RayRunner | None:
    """What reads the windows of an extraction elsewhere; None for this process."""
    if spread.on != "ray":
        return None
    from qwen_scope.cluster import RayRunner

    return RayRunner(asked, spread)


def is_first(parallel: Mode, command: str) -> bool:
    """Whether this process tells what was found: the first of those that `torchrun` started to share the work, which
    this joins, or the only one.

    Raises:
        InputError: there are several, and nothing is to be shared; or none were started.
    """
    from qwen_scope.train import join

    if parallel == "alone" and (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise InputError(f"torchrun has started {world} processes, which share the work with --parallel data")
    return join(parallel, command=command).first


@contextmanager
def reading_on(spread: WorkerOptions, asked: ScopeOptions) -> Iterator[Runner | None]:
    """The same for a command that reads several sets of documents, in this process or on Ray.

    Raises:
        InputError: on something else, or there is no cluster.
    """
    if spread.on == "torchrun":
        raise InputError("--on torchrun is for extract; this command reads with workers --on ray, or in one process")
    runner = runner_of(spread, asked)
    with nullcontext() if runner is None else runner.connected() as connected:
        yield connected

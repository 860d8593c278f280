"""Workers of a command: what reads its documents elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from qwen_scope.cluster import WorkerOptions
from qwen_scope.errors import InputError
from qwen_scope.scope import ScopeOptions

if TYPE_CHECKING:
    from qwen_scope.cluster import RayRunner
    from qwen_scope.scope import Runner

WORKERS = WorkerOptions()


def runner_of(spread: WorkerOptions, asked: ScopeOptions) -> RayRunner | None:
    """What reads the windows of an extraction elsewhere; None for this process."""
    if spread.on != "ray":
        return None
    from qwen_scope.cluster import RayRunner

    return RayRunner(asked, spread)


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

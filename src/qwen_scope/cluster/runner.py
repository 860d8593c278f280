"""`RayRunner`: the windows of an extraction on Ray Data. One task reads the corpus, workers encode and write parts."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from qwen_scope.errors import InputError, QwenScopeError, foreign, need, reason
from qwen_scope.sae import SAE
from qwen_scope.scope import Job, ModelEngine, Pieces, ScopeOptions
from qwen_scope.store import begun, ended

from .options import WorkerOptions
from .share import accepted, check_shared, opened, refusal

OBJECT_STORE = 2**28
"""Of windows that wait for a worker and of what workers have told, in the object stores of the cluster, in bytes."""

SLOT_SECONDS = 20.0
"""How long a slot that is counted as free may take to be given."""

KNOCK_SECONDS = 10.0

# A window is a block of its own, so that one worker can take it while another takes the next.
BLOCK_BYTES = 1


class RayRunner:
    """Reads and encodes the windows of an extraction on a Ray cluster.

    One task reads the corpus in its order and cuts it into windows. Each worker holds a model and its SAEs, opened
    once, and writes the parts of the windows it is given, so no activation leaves it; what it tells is the list of
    those parts. A worker that dies is started again, and its window is written again.

    Args:
        asked: how each worker opens the model and the SAEs.
        options: how many workers, and where.
        tries: workers that may die over one window before the run ends.

    Raises:
        NotFoundError: Ray is not installed.
    """

    def __init__(self, asked: ScopeOptions, options: WorkerOptions | None = None, tries: int = 5) -> None:
        need("--on ray", "ray")
        self.asked, self.options, self.tries = asked, options or WorkerOptions("ray"), tries

    @contextmanager
    def connected(self) -> Iterator[RayRunner]:
        """Several extractions on one connection to the cluster: one that is begun here ends with the block.

        Raises:
            InputError: there is no cluster.
        """
        with cluster(self.options):
            yield self

    def run(self, job: Job) -> Iterator[tuple[int, dict[str, Any]]]:
        """As `scope.Runner`.

        Raises:
            InputError: no cluster, or one without a free slot for each worker, or a store in this process's memory.
            QwenScopeError: what a worker ran into.
        """
        check_shared(job)
        with cluster(self.options):
            check_slots(self.options)
            yield from windows(job, self.asked, self.options, self.tries)


@contextmanager
def cluster(options: WorkerOptions) -> Iterator[None]:
    """The cluster that is asked for, or the one this process is connected to; one that is begun here ends here.

    Raises:
        InputError: there is none at that address.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    place = options.address or os.environ.get("RAY_ADDRESS")
    what = f"no Ray cluster answers at {place}" if place else "Ray can't be started on this machine"
    with foreign(what, InputError, "start one with: ray start --head" if place else ""):
        knock(place)
        own: dict[str, Any] = {} if place else {"include_dashboard": False}
        ray.init(address=options.address, log_to_driver=False, logging_level=logging.ERROR, **own)
    try:
        yield
    finally:
        ray.shutdown()


def knock(place: str | None) -> None:
    """Raise OSError where nothing listens at an address; Ray itself tries for minutes."""
    host, _, port = (place or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), KNOCK_SECONDS).close()


def check_slots(options: WorkerOptions) -> None:
    """Refuse a cluster that has no free slot for each worker now, rather than wait for one.

    Raises:
        InputError: it says what is free and what to ask for.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    free = ray.available_resources()
    if all(free.get(name, 0) >= amount * options.workers for name, amount in options.resources.items()):
        # Whether they fit on single machines is known to Ray alone.
        group = placement_group([options.resources] * options.workers, strategy="PACK")
        try:
            if ray.wait([group.ready()], timeout=SLOT_SECONDS)[0]:
                return
        finally:
            remove_placement_group(group)
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in options.resources.items())
    found = ", ".join(f"{free.get(name, 0):g} {name}" for name in options.resources)
    raise InputError(
        f"the cluster has no free slot for {options.workers} workers of {wanted} each (free: {found}); ask for fewer"
        " with workers=, for a smaller share of a machine with worker_cpus= or worker_gpus=, or try later"
    )


def windows(job: Job, asked: ScopeOptions, options: WorkerOptions, tries: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """What workers tell of the windows they have written, in any order.

    Raises:
        QwenScopeError: the run has ended early.
    """
    import ray
    from ray.data import ActorPoolStrategy

    from .reading import Windows

    here = os.getcwd()
    with told(), bounded():
        written = ray.data.read_datasource(Windows(job, here), override_num_blocks=1, num_cpus=0).map_batches(
            Worker,
            fn_constructor_args=(job, placed(asked), here, tries),
            batch_size=1,
            compute=ActorPoolStrategy(size=options.workers, max_tasks_in_flight_per_actor=2),
            num_cpus=options.worker_cpus,
            num_gpus=options.worker_gpus or None,
        )
        for row in written.iter_rows():
            yield row["number"], accepted(json.loads(row["written"]))


def placed(asked: ScopeOptions) -> ScopeOptions:
    """The same with whole paths of folders on this machine: a worker may stand elsewhere."""
    named = {name: getattr(asked, name) for name in ("model", "sae", "adapter")}
    whole = {name: os.path.abspath(place) for name, place in named.items() if place and os.path.exists(place)}
    if asked.model == "lab":
        whole.pop("model", None)
    return replace(asked, **whole)


@contextmanager
def bounded() -> Iterator[None]:
    """Ray Data with a bound on what lies in the object store, one window a block, and silent."""
    from ray.data import DataContext

    context = DataContext.get_current()
    limits = context.execution_options.resource_limits
    before = context.target_max_block_size, context.enable_progress_bars
    context.target_max_block_size, context.enable_progress_bars = BLOCK_BYTES, False
    context.execution_options.resource_limits = limits.copy(object_store_memory=OBJECT_STORE)
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.target_max_block_size, context.enable_progress_bars = before
        context.execution_options.resource_limits = limits
        logger.setLevel(level)


@contextmanager
def told() -> Iterator[None]:
    """What Ray ran into as one sentence.

    Raises:
        InputError: it did.
    """
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        raise InputError(
            f"the run on Ray has ended early ({reason(error)}); run the same command again, what was written is kept"
        ) from error


class Worker:
    """What a worker holds: a model and its SAEs, opened once.

    Args:
        folder: the driver's working directory.
        tries: workers that may die over one window.
    """

    def __init__(self, job: Job, asked: ScopeOptions, folder: str, tries: int) -> None:
        with suppress(OSError):  # on another machine it may not be there
            os.chdir(folder)
        self.job, self.asked, self.tries = job, asked, tries
        self._opened: tuple[ModelEngine, dict[int, SAE], Any] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Write the one window of a batch."""
        number = int(batch["number"][0])
        window = str(batch["window"][0])
        try:
            written = self.once(number, window)
        except QwenScopeError as error:
            written = refusal(error)
        return {"number": [number], "written": [json.dumps(written)]}

    def once(self, number: int, window: str) -> dict[str, Any]:
        """As `Job.write`, but for a window over which too many workers have died.

        Raises:
            QwenScopeError: as `Job.write`, or that one.
        """
        if begun(self.job.folder, number) >= self.tries:
            ended(self.job.folder, number)
            raise InputError(
                f"{self.tries} workers have died over {Pieces.from_json(window).named}; leave what is wrong there out"
                " of the corpus, or give workers more memory, and run the same command again"
            )
        try:
            return self.job.write(number, window, *self.opened())
        finally:
            ended(self.job.folder, number)

    def opened(self) -> tuple[ModelEngine, dict[int, SAE], Any]:
        """The model, the SAEs and the device they come to for their turn; opened for the first window."""
        if self._opened is None:
            engine, mine, device = opened(self.asked.open(), self.job)
            self.job.check(mine)
            self._opened = engine, mine, device
        return self._opened

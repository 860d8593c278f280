"""`WorkerOptions`: how many workers on which cluster; light enough for `--help`."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_scope.errors import InputError, brief, check_count, check_number


@dataclass(frozen=True)
class WorkerOptions:
    """Where windows of an extraction are read: in this process, or by workers, each with a model and SAEs of its own.

    Attributes:
        on: `ray`, or `torchrun` for the processes that it started; None for this process.
        workers: how many, on Ray.
        worker_cpus, worker_gpus: what each takes of its machine; a fraction shares a CPU or GPU with others.
        address: of the cluster, such as `auto` or `HOST:6379`; None for `RAY_ADDRESS` of the environment, else a
            cluster on this machine alone that ends with the extraction.

    Raises:
        InputError: something else than `ray` or `torchrun`, or a number out of range.
    """

    on: str | None = None
    workers: int = 2
    worker_cpus: float = 1.0
    worker_gpus: float = 0.0
    address: str | None = None

    def __post_init__(self) -> None:
        if self.on not in (None, "ray", "torchrun"):
            raise InputError(f"workers run on ray or torchrun, not on {brief(self.on)}")
        check_count("workers", self.workers)
        check_number("worker_cpus", self.worker_cpus, 0.01)
        check_number("worker_gpus", self.worker_gpus, 0)

    @property
    def resources(self) -> dict[str, float]:
        """What a worker takes, in Ray's words."""
        return {"CPU": self.worker_cpus, **({"GPU": self.worker_gpus} if self.worker_gpus else {})}

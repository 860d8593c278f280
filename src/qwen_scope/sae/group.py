"""The processes that `torchrun` started: which one this is, joining the others, sums, errors that all of them share."""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qwen_scope.errors import InputError, QwenScopeError, foreign, loaded, plain, reason

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ANSWER = timedelta(seconds=5)
"""How long `torchrun` may take to say what another process has said."""


def started_by_torchrun(what: str = "a group", command: str = "COMMAND") -> tuple[int, int]:
    """The number of this process among those that `torchrun` started, and how many there are, from the variables it
    sets. This process's own GPU becomes the current one, so this comes before a model is opened.

    Args:
        what, command: of the message, such as `--on torchrun` and `extract`.

    Raises:
        InputError: the process was not started by `torchrun`, or has no GPU where others have one.
    """
    told = {name: os.environ.get(name, "") for name in VARIABLES}
    numbers = [told[name] for name in VARIABLES if name != "MASTER_ADDR"]
    if not all(told.values()) or not all(number.isdecimal() for number in numbers):
        raise InputError(
            f"{what} needs processes that torchrun starts: torchrun --nproc-per-node N -m qwen_scope.cli {command}"
        )
    if torch.cuda.is_available():
        own = int(os.environ.get("LOCAL_RANK", "0"))
        if own >= torch.cuda.device_count():
            raise InputError(
                f"there is no GPU for process {own} of this machine; start it with --nproc-per-node"
                f" {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(own)
    return int(told["RANK"]), int(told["WORLD_SIZE"])


def join_group(backend: str | None = None, what: str = "a group", command: str = "COMMAND") -> tuple[int, int]:
    """Join the processes that `torchrun` started; this one's number, and how many.

    Args:
        backend: None means nccl where there is a GPU, else gloo.
        what, command: as `started_by_torchrun`.

    Raises:
        InputError: as `started_by_torchrun`, or the others can't be reached.
    """
    if not dist.is_initialized():
        started_by_torchrun(what, command)
        import torch.distributed.nn

        with foreign("the other processes of torchrun can't be reached", InputError):
            dist.init_process_group(backend or ("nccl" if torch.cuda.is_available() else "gloo"))
        # A process that ends with gloo's threads still running is aborted now and then, its work done. They end with
        # the group, if nothing else holds it: default arguments of torch.distributed.nn do when it comes after.
        atexit.register(leave_group)
    return dist.get_rank(), dist.get_world_size()


def leave_group() -> None:
    """Leave the processes that `join_group` joined, if that has not been done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce(tensor: Tensor, how: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum over the group, or what `how` says, as a new tensor on the same device that carries no gradient.

    Raises:
        InputError: another process has ended.
    """
    # nccl knows tensors on GPUs alone.
    out = tensor.detach().to("cuda" if dist.get_backend() == "nccl" else tensor.device, copy=True)
    with foreign("another process of the group has ended", InputError):
        dist.all_reduce(out, how)
    return out.to(tensor.device)


@contextmanager
def together() -> Iterator[None]:
    """A part of the work that asks nothing of the group, after which all processes go on or all raise the same error:
    none waits for one that has ended.

    Raises:
        QwenScopeError: that of the first process that ran into one.
    """
    try:
        yield
    except Exception as error:
        shared = first_refusal(error)
        if shared is error or shared is None:
            raise
        raise shared from error
    if (shared := first_refusal(None)) is not None:
        raise shared


def first_refusal(mine: Exception | None) -> Exception | None:
    """What a process raises when all have told what they ran into, if anything: the first one's refusal, or its own
    error, if that is a bug."""
    if not int(all_reduce(torch.tensor(int(mine is not None)), dist.ReduceOp.MAX)):
        return None
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if mine is None else refusal(mine))
    if mine is not None and not isinstance(mine, QwenScopeError):
        return mine
    return loaded(*next(one for one in told if one is not None))


def refusal(error: Exception) -> tuple[str, str]:
    """An error as other processes are told of it."""
    if isinstance(error, QwenScopeError):
        return plain(error)
    return plain(InputError(f"another process of the group has ended: {reason(error)}"))


def said_before(sentence: str) -> bool:
    """Whether another process that `torchrun` started with this one has asked the same of the same sentence.

    Most of what one process runs into, all do, and it is worth saying once. False where nobody can be asked.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not all(map(os.environ.get, VARIABLES)):
        return False
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    key = f"qwen-scope-said-{again}-{hashlib.sha256(sentence.encode()).hexdigest()}"
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*place, is_master=False, timeout=ANSWER)  # pyright: ignore[reportPrivateImportUsage]
        return store.add(key, 1) > 1
    except (RuntimeError, ValueError):
        return False

"""Training over several processes, by torch.distributed alone: started with `torchrun`, or not at all.

Three ways to run in parallel, each giving the weights of one process up to the order in which fp32 numbers are added:

- `data`: every rank trains on its share of each batch; gradients and statistics are summed.
- `layers`: every rank trains some of the layers; nothing is exchanged.
- `features`: every rank holds a slice of one wide dictionary; the choice of active features and the reconstruction
  are agreed on, gradients stay where they are.

Measuring knows `data` alone: every rank reads its share of the batches, and sums are added up.

The arithmetic asks `Ranks` for sums; in a single process each of them is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.sae import all_reduce, join_group, together
from qwen_scope.text import Counted

T = TypeVar("T")

Mode = Literal["alone", "data", "layers", "features"]
MODES: tuple[Mode, ...] = ("alone", "data", "layers", "features")


@dataclass(frozen=True)
class Ranks:
    """Which process this is among how many, and what they share.

    Attributes:
        mode: what is divided among the ranks.
        rank, world: this process, and how many there are.
    """

    mode: Mode = "alone"
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"parallel is one of {', '.join(MODES)}, not {self.mode!r}")
        if self.mode == "alone" and self.world > 1:
            raise InputError(f"{self.world} processes need to know what to share: data, layers or features")

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def over_rows(self, tensor: Tensor) -> Tensor:
        """The sum over the shares of the batch."""
        return all_reduce(tensor) if self.mode == "data" else tensor

    def sum_of(self, values: np.ndarray) -> np.ndarray:
        """The same of an array, in its own type."""
        return self.over_rows(torch.from_numpy(values)).numpy()

    def totals(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The same of counts by name; all ranks have the same names."""
        found = self.over_rows(torch.tensor(list(counts.values()), dtype=torch.int64))
        return dict(zip(counts, found.tolist(), strict=True))

    def batches_of(self, batches: Sequence[T]) -> Sequence[T]:
        """Those that this rank measures, of all; whole ones, so that each is read as one process reads it."""
        return batches[self.rank :: self.world] if self.mode == "data" else batches

    def names_of(self, names: Sequence[str]) -> Sequence[str]:
        """The longest list of any rank, on all of them."""
        if self.mode != "data":
            return names
        told: list[Any] = [None] * self.world
        dist.all_gather_object(told, names)
        return max(told, key=len)

    def together(self) -> AbstractContextManager[None]:
        """A part of the work without sums: an error of one rank is raised by all."""
        return together() if self.world > 1 else nullcontext()

    def over_features(self, tensor: Tensor) -> Tensor:
        """The sum over the slices of the dictionary."""
        return all_reduce(tensor) if self.mode == "features" else tensor

    def over_both(self, tensor: Tensor) -> Tensor:
        """The sum over shares of the batch or slices of the dictionary, whichever is divided."""
        return self.over_rows(self.over_features(tensor))

    def least(self, tensor: Tensor) -> Tensor:
        """The smallest value over shares of the batch or slices of the dictionary."""
        return all_reduce(tensor, dist.ReduceOp.MIN) if self.mode in ("data", "features") else tensor.detach().clone()

    def all_rows(self, tensor: Tensor) -> Tensor:
        """The rows of all shares of the batch, in the order of the ranks: `(n, ...)`, n may differ."""
        return gathered(tensor) if self.mode == "data" else tensor

    def all_candidates(self, values: Tensor) -> Tensor:
        """Side by side, the candidates that every slice of the dictionary offers: `(n, c) -> (n, world * c)`."""
        if self.mode != "features":
            return values
        parts = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts, dim=1)

    def slice_of(self, d_sae: int) -> slice:
        """The features that this rank holds.

        Raises:
            InputError: the dictionary can't be cut into equal slices.
        """
        if self.mode != "features":
            return slice(0, d_sae)
        if d_sae % self.world:
            raise InputError(f"{d_sae} features can't be cut into {self.world} equal slices")
        width = d_sae // self.world
        return slice(self.rank * width, (self.rank + 1) * width)

    def share_of(self, batch: int) -> int:
        """How many tokens of each batch this rank trains on.

        Raises:
            InputError: the batch can't be cut into equal shares.
        """
        if self.mode != "data":
            return batch
        if batch % self.world:
            raise InputError(f"a batch of {batch} tokens can't be cut into {self.world} equal shares")
        return batch // self.world

    def owned(self, names: Sequence[str]) -> list[str]:
        """The layers that this rank trains, of all that are trained.

        Raises:
            InputError: there are fewer layers than ranks.
        """
        if self.mode != "layers":
            return list(names)
        if len(names) < self.world:
            raise InputError(f"{len(names)} layers can't be divided among {self.world} processes; start fewer")
        return list(names)[self.rank :: self.world]

    def of_first(self, tensor: Tensor) -> Tensor:
        """The first rank's values, on every rank."""
        out = tensor.detach().clone()
        if self.world > 1:
            dist.broadcast(out, 0)
        return out

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()


def join(mode: Mode, backend: str | None = None, command: str = "train") -> Ranks:
    """Join the processes that `torchrun` started, from the variables it sets; none are asked for to be `alone`.

    Args:
        backend: None means nccl where there is a GPU, else gloo.
        command: what is typed, of the message.

    Raises:
        InputError: the process was not started by `torchrun`, or the mode is unknown.
    """
    return Ranks() if mode == "alone" else Ranks(mode, *join_group(backend, f"parallel over {mode}", command))


def counted_of_first(counted: Counted, ranks: Ranks, device: torch.device | str) -> Counted:
    """Which tokens count, with the thresholds of the first rank on every rank."""
    limits = [math.nan if norm is None else norm for norm in counted.norms.values()]
    place = device if ranks.world > 1 else None  # alone they stay off a device without float64
    limits = ranks.of_first(torch.tensor(limits, dtype=torch.float64, device=place)).tolist()
    norms = zip(counted.norms, limits, strict=True)
    return replace(counted, norms={at: None if math.isnan(norm) else norm for at, norm in norms})


def gathered(tensor: Tensor) -> Tensor:
    """The rows of all ranks, which may have different numbers of them."""
    world = dist.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(world)]
    dist.all_gather(counts, counts[0].new_tensor([len(tensor)]))
    sizes = [int(count) for count in counts]
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class SumOfSlices(torch.autograd.Function):
    """The sum over slices of the dictionary.

    Every rank goes on to the same loss from the same sum, so the gradient of a part is that of the sum.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return ranks.over_features(part) if ranks.mode == "features" else part.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class SharedBySlices(torch.autograd.Function):
    """A tensor that every slice reads, unchanged; its gradient is the sum of what the slices ask for."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ranks.over_features(grads[0]), None

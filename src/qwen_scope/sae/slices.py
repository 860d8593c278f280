"""A dictionary cut by width: each process of a group holds a slice of the features, and all get the same answers."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast, final

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError, MismatchError, QwenScopeError

from .acts import FeatureActs
from .base import SAE, check_features, check_residual

T = TypeVar("T")


def join_group(backend: str | None = None) -> tuple[int, int]:
    """Join the processes that `torchrun` started, from the variables it sets; this one's number, and how many.

    Args:
        backend: None means nccl where there is a GPU, else gloo.

    Raises:
        InputError: the process was not started by `torchrun`.
    """
    if not dist.is_initialized():
        if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
            raise InputError("a group of processes is started with: torchrun --nproc-per-node N -m qwen_scope.cli")
        import torch.distributed.nn

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend or ("nccl" if torch.cuda.is_available() else "gloo"))
        # A process that ends with gloo's threads still running is aborted now and then, its work done. They end with
        # the group, if nothing else holds it: default arguments of torch.distributed.nn do when it comes after.
        atexit.register(leave_group)
    return dist.get_rank(), dist.get_world_size()


def leave_group() -> None:
    """Leave the processes that `join_group` joined, if that has not been done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def slice_sae(sae: SAE, rank: int, world: int) -> SliceOfSAE:
    """The slice of one process of `world`; of a memory-mapped SAE no other rows of `W_enc` are read.

    Raises:
        InputError: there are more processes than features.
    """
    if not 0 <= rank < world <= sae.d_sae:
        raise InputError(f"{sae.d_sae} features can't be cut into slice {rank} of {world}")
    first, last = (sae.d_sae * i // world for i in (rank, rank + 1))
    own: dict[str, Any] = {name: tensor[first:last] for name, tensor in sae.own_tensors().items()}
    if sae.fixed_k:
        own["k"] = min(cast(int, sae.k), last - first)
    cut = {"W_enc": sae.W_enc[first:last], "W_dec": sae.W_dec[:, first:last], "b_enc": sae.b_enc[first:last]}
    return SliceOfSAE(replace(cast(Any, sae), **cut, **own), first, sae.d_sae, sae.k)


@final
class SliceOfSAE(SAE):
    """The features `first` on of an SAE, for `encode`, `pre_acts` and `decode` by all processes of a group together.

    Every process calls the same methods in the same order with the same tensors, and gets what the whole SAE gives:
    the same features with the same values, ties by the lower index; sums of `decode` differ in their last digits. Which
    SAE it is (`identity`) stays that of the whole. Weights are those of the slice, `d_sae` is the whole width, and no
    gradient flows.

    Args:
        part: the slice as an SAE of its own.   first: its first feature in the whole.   width: of the whole.
        k: of the whole.
    """

    def __init__(self, part: SAE, first: int, width: int, k: int | None) -> None:
        self.part, self.first, self.width, self.k = part, first, width, k
        self.architecture = part.architecture  # pyright: ignore[reportAttributeAccessIssue]  # it is another's
        self.own, self.fixed_k = part.own, part.fixed_k  # pyright: ignore[reportAttributeAccessIssue]
        self.hook_point, self.identity, self.meta, self._finite = part.hook_point, part.identity, part.meta, set()
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = part.W_enc, part.W_dec, part.b_enc, part.b_dec
        for name, tensor in part.own_tensors().items():
            setattr(self, name, tensor)

    @property
    def d_sae(self) -> int:
        return self.width

    @property
    def cached_bytes(self) -> int:
        return self.part.cached_bytes

    def encode(self, x: Float[Tensor, "*rows d_model"]) -> FeatureActs:
        mine = agreed(lambda: self.part.encode(x))
        slots = int(reduced(torch.tensor(mine.k, device=x.device), dist.ReduceOp.MAX))
        pad = (0, slots - mine.k)
        values = torch.nn.functional.pad(mine.values.float(), pad)
        indices = torch.nn.functional.pad(torch.where(mine.values > 0, mine.indices + self.first, 0), pad)
        values, indices = gathered(values), gathered(indices.to(torch.int32))
        # Slices stand in their order and ties inside one by their index, which a stable sort keeps.
        values, order = values.sort(dim=-1, descending=True, stable=True)
        active = (values > 0).sum(-1)
        k = self.k if self.k is not None else int(active.max()) if active.numel() else 0
        return FeatureActs._from_sorted(values[..., :k], indices.gather(-1, order)[..., :k], self.width)

    def pre_acts(
        self, x: Float[Tensor, "*rows d_model"], features: Sequence[int] | Tensor | None = None
    ) -> Float[Tensor, "*rows n"]:
        check_residual(x, self.d_model)
        with torch.no_grad():
            if features is None:
                return gathered(agreed(lambda: self.part.pre_acts(x)), self.width)
            wanted = check_features(features, self.width, self.device)
            here = (wanted >= self.first) & (wanted < self.first + self.part.d_sae)
            found = agreed(lambda: self.part.pre_acts(x, torch.where(here, wanted - self.first, 0)))
            return reduced(torch.where(here, found, 0.0))

    def decode(self, acts: FeatureActs) -> Float[Tensor, "*rows d_model"]:
        if acts.width != self.width:
            raise MismatchError(
                f"activations of a {acts.width}-wide dictionary can't be decoded by one of {self.width}"
            )
        here = (acts.indices >= self.first) & (acts.indices < self.first + self.part.d_sae)
        indices = torch.where(here, acts.indices - self.first, 0)
        own = FeatureActs(indices, torch.where(here, acts.values, 0), self.part.d_sae)
        bare = replace(cast(Any, self.part), b_dec=torch.zeros_like(self.b_dec))
        with torch.no_grad():
            return reduced(agreed(lambda: bare.decode(own))) + self.b_dec

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SliceOfSAE:
        return SliceOfSAE(self.part.to(device, dtype), self.first, self.width, self.k)

    def by_feature(self) -> SliceOfSAE:
        return SliceOfSAE(self.part.by_feature(), self.first, self.width, self.k)


def agreed(run: Callable[[], T]) -> T:
    """What `run` gives, where no process of the group refuses: none is left waiting for one that does.

    Raises:
        QwenScopeError: this process's own refusal.   InputError: another's.
    """
    refused, found = None, None
    try:
        found = run()
    except QwenScopeError as error:
        refused = error
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    others = reduced(torch.tensor(int(refused is not None), device=device), dist.ReduceOp.MAX)
    if refused is not None:
        raise refused
    if others:
        raise InputError("another process of the group has refused its slice of the SAE; its own error says why")
    return cast(T, found)


def reduced(tensor: Tensor, how: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum over the group, or its largest value, as a new tensor."""
    out = tensor.detach().clone()
    dist.all_reduce(out, how)
    return out


def gathered(tensor: Tensor, width: int | None = None) -> Tensor:
    """The last dimensions of all processes one behind the other.

    Args:
        width: of the result, where slices are those of `slice_sae`; None where all are equally wide.
    """
    world = dist.get_world_size()
    widths = [tensor.shape[-1]] * world
    if width is not None:
        widths = [width * (i + 1) // world - width * i // world for i in range(world)]
    wide = torch.nn.functional.pad(tensor.detach(), (0, max(widths) - tensor.shape[-1])).contiguous()
    parts = [torch.empty_like(wide) for _ in range(world)]
    dist.all_gather(parts, wide)
    return torch.cat([part[..., :n] for part, n in zip(parts, widths, strict=True)], -1)

"""A dictionary cut by width: each process of a group holds a slice of the features, and all get the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, final

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError, MismatchError

from .acts import FeatureActs
from .base import SAE, check_features, check_residual
from .group import all_reduce, together


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
        with together():
            mine = self.part.encode(x)
        slots = int(all_reduce(torch.tensor(mine.k, device=x.device), dist.ReduceOp.MAX))
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
                with together():
                    found = self.part.pre_acts(x)
                return gathered(found, self.width)
            wanted = check_features(features, self.width, self.device)
            here = (wanted >= self.first) & (wanted < self.first + self.part.d_sae)
            with together():
                found = self.part.pre_acts(x, torch.where(here, wanted - self.first, 0))
            return all_reduce(torch.where(here, found, 0.0))

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
            with together():
                found = bare.decode(own)
            return all_reduce(found) + self.b_dec

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SliceOfSAE:
        return SliceOfSAE(self.part.to(device, dtype), self.first, self.width, self.k)

    def by_feature(self) -> SliceOfSAE:
        return SliceOfSAE(self.part.by_feature(), self.first, self.width, self.k)


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

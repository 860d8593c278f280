"""`Change`: all interventions at one hook point, prepared to cost as little per token as they can."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qwen_scope.errors import InputError, MismatchError
from qwen_scope.sae import SAE

from .activation import activations
from .intervention import Intervention
from .where import Where

# By operation on a feature and its amount: factor, offset, lower and upper bound of the new activation.
_LINE: dict[str, Callable[[float], tuple[float, float, float, float]]] = {
    "scale": lambda amount: (amount, 0.0, -math.inf, math.inf),
    "clamp": lambda amount: (0.0, amount, -math.inf, math.inf),
    "floor": lambda amount: (1.0, 0.0, amount, math.inf),
    "cap": lambda amount: (1.0, 0.0, -math.inf, amount),
    "ablate": lambda amount: (0.0, 0.0, -math.inf, math.inf),
}

# Below this share of the largest singular value, a direction is a mixture of the others.
DEPENDENT = 1e-6


def change_reference(
    interventions: Sequence[Intervention], h: Float[Tensor, "*rows d_model"], sae: SAE | None
) -> Float[Tensor, "*rows d_model"]:
    """The definition: everything reads `h` as it arrives and the differences add up; then directions are removed."""
    new = h
    for one in interventions:
        if one.direction is None or one.op == "add":
            new = new + (one.apply(h, sae) - h)
    for one in interventions:
        if one.direction is not None and one.op == "ablate":
            new = one.apply(new, sae)
    return new


@dataclass(frozen=True, eq=False)
class Change:
    """The interventions at one hook point that touch the same tokens, all of one kind: differences, or removals.

    Attributes:
        where: the tokens.
        vector: the sum of everything added, `(d_model,)` in the model's dtype, or None.
        features: the features whose activations are set: scaled, clamped, bounded or ablated.
        factor, offset, low, high: their new activation is `factor * a + offset`, bounded by `low` and `high`; `(n,)`
            fp32 each, on the SAE's device.
        columns: their decoder columns, `(n, d_model)` fp32: a copy of these alone.
        basis: an orthonormal basis of the directions to remove, `(m, d_model)` fp32, or None.
        share: how much of the component in that space is removed.
        sae: the dictionary of the features, or None.
    """

    where: Where
    vector: Tensor | None = None
    features: tuple[int, ...] = ()
    factor: Tensor | None = None
    offset: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    columns: Tensor | None = None
    basis: Tensor | None = None
    share: float = 0.0
    sae: SAE | None = None

    @classmethod
    def of(
        cls, interventions: Sequence[Intervention], sae: SAE | None, device: torch.device, dtype: torch.dtype
    ) -> Change:
        """Prepare interventions with raw amounts and one `where` for a residual of this device and dtype.

        Raises:
            InputError: an amount that overflows the dtype.
        """
        where = interventions[0].where
        if interventions[0].removes_direction:
            gone = [one for one in interventions if one.amount != 0]
            return cls(where, basis=_basis(gone).to(device), share=gone[0].amount) if gone else cls(where)
        adds = [one for one in interventions if one.op == "add" and one.amount != 0]
        sets = [one for one in interventions if one.op != "add"]
        vector = None
        if adds:
            vector = torch.stack([one.amount * one.vector(sae).to(device) for one in adds]).sum(0).to(dtype)
            if not bool(vector.isfinite().all()):
                raise InputError(f"what is added at {adds[0].hook_point} is too large for {dtype}")
        if not sets:
            return cls(where, vector)
        assert sae is not None, "only a feature can be set"
        numbers = torch.tensor([_LINE[one.op](one.amount) for one in sets], dtype=torch.float32, device=sae.device)
        factor, offset, low, high = numbers.unbind(-1)
        return cls(
            where,
            vector,
            features=tuple(one.feature for one in sets if one.feature is not None),
            factor=factor,
            offset=offset,
            low=low,
            high=high,
            columns=torch.stack([one.vector(sae).to(device) for one in sets]),
            sae=sae,
        )

    @property
    def nothing(self) -> bool:
        """Whether no residual can change."""
        return self.vector is None and not self.features and self.basis is None

    def __call__(
        self, h: Float[Tensor, "*rows d_model"], chosen: Bool[Tensor, "*rows"] | None
    ) -> Float[Tensor, "*rows d_model"]:
        """The residual after the change, at the chosen tokens (None: at all); `h` itself where nothing changes."""
        if self.vector is not None and not self.features:
            new = h + self.vector.to(h.device, h.dtype)
            return new if chosen is None else torch.where(chosen[..., None], new, h)
        rows = h.reshape(-1, h.shape[-1]) if chosen is None else h[chosen]
        if not len(rows):
            return h
        new = self._removed(rows) if self.basis is not None else self._set(rows)
        if new is rows:
            return h
        if chosen is None:
            return new.reshape(h.shape)
        out = h.clone()
        out[chosen] = new
        return out

    def _set(self, rows: Tensor) -> Tensor:
        """Features set to their new activations, and the vector added."""
        assert self.sae is not None
        assert self.factor is not None
        assert self.offset is not None
        assert self.columns is not None
        a = activations(self.sae, rows, list(self.features))
        difference = ((self.factor * a + self.offset).clamp(self.low, self.high) - a).to(rows.device)
        new = rows.float() + difference @ self.columns
        if self.vector is not None:
            return (new + self.vector.float()).to(rows.dtype)
        moved = (difference != 0).any(-1)
        return torch.where(moved[:, None], new.to(rows.dtype), rows) if bool(moved.any()) else rows

    def _removed(self, rows: Tensor) -> Tensor:
        assert self.basis is not None
        component = rows.float() @ self.basis.T
        return (rows.float() - self.share * component @ self.basis).to(rows.dtype)


def grouped(
    interventions: Sequence[Intervention], sae: SAE | None, device: torch.device, dtype: torch.dtype
) -> list[Change]:
    """The interventions at one hook point as changes in the order in which they apply: directions are removed last.

    Args:
        interventions: with raw amounts, all at one hook point.
        sae: the dictionary of their features.
        device, dtype: of the residual.

    Raises:
        InputError, MismatchError: as in `Change.of` and `Intervention.vector`.
    """
    groups: dict[tuple[bool, Where], list[Intervention]] = {}
    for one in interventions:
        groups.setdefault((one.removes_direction, one.where), []).append(one)
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    changes = [Change.of(group, sae, device, dtype) for _, group in ordered]
    return [change for change in changes if not change.nothing]


def changed(
    h: Float[Tensor, "*rows d_model"], changes: Sequence[Change], chosen: Sequence[Bool[Tensor, "*rows"] | None]
) -> Float[Tensor, "*rows d_model"]:
    """The residuals after all changes at one hook point; pure, and `h` itself where nothing changes.

    Differences all read `h` as it arrives and add up; then directions are removed. PyTorch hooks and servers both end
    here.

    Args:
        changes: as `grouped` orders them.
        chosen: for each, the rows it touches; None for all.
    """
    new = h
    for one, rows in zip(changes, chosen, strict=True):
        if one.basis is not None:
            new = one(new, rows)
            continue
        now = one(h, rows)
        if now is not h:
            new = now if new is h else torch.where(new == h, now, new + (now - h))
    return new


def check_together(interventions: Sequence[Intervention]) -> None:
    """Refuse interventions that contradict each other.

    Raises:
        InputError: one feature is set twice on the same tokens, or directions are ablated by unequal shares.
        MismatchError: two interventions at one hook point name different SAEs.
    """
    for i, one in enumerate(interventions):
        for other in interventions[:i]:
            if one.hook_point != other.hook_point:
                continue
            if one.sae is not None and other.sae is not None and one.sae != other.sae:
                raise MismatchError(f"two SAEs are named at {one.hook_point}: {one.sae} and {other.sae}")
            if "add" in (one.op, other.op) or not one.where.overlaps(other.where):
                continue
            if one.feature is not None and one.feature == other.feature and not _band(one, other):
                raise InputError(
                    f"feature {one.feature} of layer {one.layer} is set twice on the same tokens, by {other.op} and by"
                    f" {one.op}"
                )
            both = one.direction is not None and other.direction is not None
            if both and (one.amount != other.amount or one.where != other.where):
                raise InputError(
                    f"directions ablated at {one.hook_point} on the same tokens need the same amount and where"
                )


def _band(one: Intervention, other: Intervention) -> bool:
    """Whether one is a floor and the other a cap that is not below it: at most one of them moves any activation."""
    low, high = (one, other) if one.op == "floor" else (other, one)
    return (low.op, high.op) == ("floor", "cap") and low.unit == high.unit and low.amount <= high.amount


def _basis(gone: Sequence[Intervention]) -> Tensor:
    """Orthonormal rows that span the ablated directions."""
    directions = torch.stack([i.vector(None).double() for i in gone])
    directions = directions / torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
    _, sizes, rows = torch.linalg.svd(directions, full_matrices=False)
    return rows[sizes > DEPENDENT * sizes[0]].float()

"""`Intervention`: one change of the residual stream, as a value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError, MismatchError, NotFoundError, brief, check_count, check_number, nearest
from qwen_scope.files import Fields
from qwen_scope.model import HookPoint, LayerStats
from qwen_scope.sae import SAE, Identity

from .activation import activations
from .where import EVERYWHERE, Where

Op = Literal["add", "scale", "clamp", "floor", "cap", "ablate"]
Unit = Literal["raw", "resid_norm", "max_act"]

LARGEST = {"raw": 1e6, "resid_norm": 100.0, "max_act": 1000.0}
"""Amounts beyond these are taken for mistakes."""

_FIELDS = {"hook_point", "op", "feature", "direction", "amount", "unit", "where", "sae"}


@dataclass(frozen=True)
class Intervention:
    """One change of the residual at one hook point: frozen, comparable, plain data.

    With `d` the feature's decoder column `W_dec[:, feature]` or the plain direction, and `a` the feature's activation
    on the residual as it arrives:

    | op | a feature | a plain direction |
    |---|---|---|
    | `add` | `h + amount * d` (equation 1 of the Qwen-Scope report) | the same |
    | `scale` | `h + (amount - 1) * a * d` | - |
    | `clamp` | `h + (amount - a) * d` | - |
    | `floor` | `h + max(amount - a, 0) * d` | - |
    | `cap` | `h + min(amount - a, 0) * d` | - |
    | `ablate` | `h - a * d` | `h - amount * (h . u) u`, `u = d / |d|` |

    The feature operations add a difference, so what the SAE does not reconstruct stays in the stream. A feature that
    is not active is not changed by `scale` and `ablate`, nor one on the right side of its `floor` or `cap`, to the bit.

    Attributes:
        hook_point: where.
        op: what is done.
        amount: how much, in `unit`; for `scale` the factor; for `ablate` of a direction the share that is removed.
        feature: its index in the dictionary, or None for a plain direction.
        direction: `d_model` numbers, or None for a feature.
        unit: `raw`; `resid_norm`: the change `amount * d` is `amount` times as long as the layer's median residual;
            `max_act`: multiples of the feature's largest activation. The last two need `resolve`.
        where: which tokens.
        sae: which SAE the feature belongs to, or None for whichever SAE is at hand.

    Raises:
        InputError: a combination that means nothing, an amount that is NaN or absurd, or a zero direction.
    """

    hook_point: HookPoint
    op: Op
    amount: float
    feature: int | None = None
    direction: tuple[float, ...] | None = None
    unit: Unit = "raw"
    where: Where = EVERYWHERE
    sae: Identity | None = None

    def __post_init__(self) -> None:
        _check_choice("op", self.op, get_args(Op))
        _check_choice("unit", self.unit, get_args(Unit))
        if (self.feature is None) == (self.direction is None):
            raise InputError("an intervention acts on a feature or on a direction: give one of the two")
        if self.feature is not None:
            check_count("a feature", self.feature, 0)
        if self.direction is not None:
            if self.op not in ("add", "ablate"):
                raise InputError(f"{self.op} needs a feature; a plain direction can be added or ablated")
            if not all(map(math.isfinite, self.direction)) or not any(self.direction):
                raise InputError("a direction holds finite numbers that are not all zero")
        check_number("an amount", self.amount)
        if abs(self.amount) > LARGEST[self.unit]:
            raise InputError(
                f"an amount of {self.amount:g} {self.unit} is absurd: at most {LARGEST[self.unit]:g} either way"
            )
        if self.unit != "raw" and self.op in ("scale", "ablate"):
            raise InputError(f"{self.op} has no unit {self.unit!r}: its amount is a share; leave the unit 'raw'")
        if self.unit == "max_act" and self.feature is None:
            raise InputError("a plain direction has no largest activation; use the unit 'raw' or 'resid_norm'")
        if self.where.nowhere:
            raise InputError("the intervention touches no token; say where, such as 'all'")

    @classmethod
    def add(
        cls,
        *,
        layer: int | HookPoint,
        amount: float,
        feature: int | None = None,
        direction: Sequence[float] | Tensor | None = None,
        unit: Unit = "raw",
        where: str = "all",
        sae: Identity | None = None,
    ) -> Intervention:
        """`h + amount * d`: a feature's decoder column, or any vector of `d_model` numbers.

        `layer` is here and below the number of a layer, whose output is changed, or a hook point such as
        `scope.hook_point(4)`, for SAEs that read another stream.
        """
        vector = _vector(direction)
        return cls(_point(layer), "add", float(amount), feature, vector, unit, Where.parse(where), sae)

    @classmethod
    def scale(
        cls, *, layer: int | HookPoint, feature: int, amount: float, where: str = "all", sae: Identity | None = None
    ) -> Intervention:
        """The feature's activation times `amount`, where it is active."""
        return cls(_point(layer), "scale", float(amount), feature, where=Where.parse(where), sae=sae)

    @classmethod
    def clamp(
        cls,
        *,
        layer: int | HookPoint,
        feature: int,
        amount: float,
        unit: Unit = "raw",
        where: str = "all",
        sae: Identity | None = None,
    ) -> Intervention:
        """The feature's activation set to `amount`, active or not."""
        return cls(_point(layer), "clamp", float(amount), feature, None, unit, Where.parse(where), sae)

    @classmethod
    def floor(
        cls,
        *,
        layer: int | HookPoint,
        feature: int,
        amount: float,
        unit: Unit = "raw",
        where: str = "all",
        sae: Identity | None = None,
    ) -> Intervention:
        """The feature's activation raised to `amount` where it is below, an inactive feature included."""
        return cls(_point(layer), "floor", float(amount), feature, None, unit, Where.parse(where), sae)

    @classmethod
    def cap(
        cls,
        *,
        layer: int | HookPoint,
        feature: int,
        amount: float,
        unit: Unit = "raw",
        where: str = "all",
        sae: Identity | None = None,
    ) -> Intervention:
        """The feature's activation lowered to `amount` where it is above."""
        return cls(_point(layer), "cap", float(amount), feature, None, unit, Where.parse(where), sae)

    @classmethod
    def ablate(
        cls,
        *,
        layer: int | HookPoint,
        feature: int | None = None,
        direction: Sequence[float] | Tensor | None = None,
        amount: float | None = None,
        where: str = "all",
        sae: Identity | None = None,
    ) -> Intervention:
        """The feature's activation set to zero, or the residual's component along a direction removed.

        `amount` is for a direction alone: the share removed, by default all of it. Several directions ablated at one
        hook point are removed together, as the space they span.
        """
        if feature is not None and amount is not None:
            raise InputError("ablating a feature has no amount; to keep a share of it, use scale")
        share = float(amount) if amount is not None else (0.0 if feature is not None else 1.0)
        return cls(_point(layer), "ablate", share, feature, _vector(direction), where=Where.parse(where), sae=sae)

    @property
    def layer(self) -> int:
        return self.hook_point.layer

    @property
    def removes_direction(self) -> bool:
        """Whether it removes a plain direction, which happens after everything else."""
        return self.op == "ablate" and self.direction is not None

    @property
    def needs_stats(self) -> bool:
        """Whether `resolve` needs the layer's statistics."""
        return self.unit != "raw"

    def with_amount(self, amount: float) -> Intervention:
        """The same intervention by another amount."""
        return replace(self, amount=float(amount))

    def at(self, point: HookPoint) -> Intervention:
        """The same intervention at another hook point."""
        return replace(self, hook_point=point)

    def bound(self, sae: SAE) -> Intervention:
        """The same intervention, tied to the identity of this SAE.

        Raises:
            InputError, MismatchError: as in `check`.
        """
        self.check(sae)
        return self if self.feature is None else replace(self, sae=sae.identity)

    def check(self, sae: SAE | None) -> None:
        """Refuse an SAE that this intervention does not fit.

        Raises:
            InputError: no SAE for a feature, or a feature outside the dictionary.
            MismatchError: another SAE than the one named, one of another layer, or a direction of another width.
        """
        if self.direction is not None:
            if sae is not None and len(self.direction) != sae.d_model:
                raise MismatchError(f"the direction has {len(self.direction)} numbers, the residual {sae.d_model}")
            return
        assert self.feature is not None
        if sae is None:
            raise InputError(f"feature {self.feature} of layer {self.layer} needs its SAE")
        if self.sae is not None and self.sae != sae.identity:
            raise MismatchError(f"the intervention is made for the SAE {self.sae}, this one is {sae.identity}")
        if sae.hook_point is not None and HookPoint.parse(sae.hook_point) != self.hook_point:
            raise MismatchError(f"the intervention is at {self.hook_point}, the SAE reads {sae.hook_point}")
        if self.feature >= sae.d_sae:
            raise InputError(
                f"feature {self.feature} does not exist: the SAE of layer {self.layer} has features 0 to"
                f" {sae.d_sae - 1}"
            )

    def vector(self, sae: SAE | None) -> Float[Tensor, " d_model"]:
        """`d`, in fp32: the feature's decoder column as it is stored, not normalised, or the plain direction.

        Raises:
            InputError: a decoder column that is zero or not finite, or what `check` refuses.
            MismatchError: as in `check`.
        """
        self.check(sae)
        if self.direction is not None:
            return torch.tensor(self.direction, dtype=torch.float32)
        assert sae is not None
        assert self.feature is not None
        column = sae.W_dec[:, self.feature].float()
        if not bool(column.isfinite().all()):
            raise InputError(
                f"feature {self.feature} of layer {self.layer} can't be steered: its decoder column W_dec"
                f"[:, {self.feature}] holds NaN or infinity"
            )
        if not bool(column.any()):
            raise InputError(f"feature {self.feature} of layer {self.layer} writes nothing: its decoder is zero")
        return column

    def resolve(self, stats: LayerStats | None = None, sae: SAE | None = None) -> Intervention:
        """The same intervention with its amount in raw units.

        Raises:
            InputError: statistics are missing, lack what the unit needs, or are of another layer; or the raw amount
                comes out as absurd.
            MismatchError: as in `check`.
        """
        if self.unit == "raw":
            return self
        if stats is None:
            raise InputError(f"the unit {self.unit!r} needs the statistics of layer {self.layer}")
        if stats.hook_point != self.hook_point:
            raise InputError(f"the statistics are of {stats.hook_point}, the intervention is at {self.hook_point}")
        if self.unit == "resid_norm":
            length = float(torch.linalg.vector_norm(self.vector(sae)))
            return replace(self, amount=self.amount * stats.norm_median / length, unit="raw")
        self.check(sae)
        largest = 0.0
        if stats.feature_max is not None and self.feature is not None and self.feature < len(stats.feature_max):
            largest = float(stats.feature_max[self.feature])
        if largest == 0:
            raise InputError(
                f"feature {self.feature} of layer {self.layer} is never active in {stats.sample}, so its largest"
                " activation is unknown; give the amount in the unit 'raw' or 'resid_norm'"
            )
        return replace(self, amount=self.amount * largest, unit="raw")

    def apply(self, h: Float[Tensor, "*rows d_model"], sae: SAE | None = None) -> Float[Tensor, "*rows d_model"]:
        """The residuals after this intervention alone; pure, on every row it is given.

        The caller selects the rows; `where` is not read. What changes nothing returns `h` itself.

        Raises:
            InputError: a unit that is not resolved, or what `check` refuses.
            MismatchError: as in `check`.
        """
        if self.unit != "raw":
            raise InputError(f"an amount in {self.unit} has to be resolved before it is applied")
        d = self.vector(sae)
        if len(d) != h.shape[-1]:
            raise MismatchError(f"the direction has {len(d)} numbers, the residual {h.shape[-1]}")
        if self.op == "add":
            return h if self.amount == 0 else h + (self.amount * d).to(h.device, h.dtype)
        rows = h.reshape(-1, h.shape[-1])
        if self.feature is None:
            u = (d / torch.linalg.vector_norm(d)).to(h.device)
            coefficient = -self.amount * (rows.float() @ u)
            d = u
        else:
            assert sae is not None
            a = activations(sae, rows, [self.feature])[:, 0]
            coefficient = (self.target(a) - a).to(h.device)
        moved = coefficient != 0
        if not bool(moved.any()):
            return h
        new = (rows.float() + coefficient[:, None] * d.to(h.device)).to(h.dtype)
        return torch.where(moved[:, None], new, rows).reshape(h.shape)

    def target(self, a: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
        """The activations that replace `a` under every operation on a feature but `add`."""
        if self.op == "clamp":
            return torch.full_like(a, self.amount)
        if self.op == "floor":
            return a.clamp(min=self.amount)
        if self.op == "cap":
            return a.clamp(max=self.amount)
        return a * (0.0 if self.op == "ablate" else self.amount)

    def to_json(self) -> dict[str, Any]:
        """Plain values that `json.dumps` takes and `from_json` turns back into an equal intervention."""
        data: dict[str, Any] = {"hook_point": str(self.hook_point), "op": self.op}
        if self.feature is not None:
            data["feature"] = self.feature
        if self.direction is not None:
            data["direction"] = list(self.direction)
        data |= {"amount": self.amount, "unit": self.unit, "where": str(self.where)}
        if self.sae is not None:
            data["sae"] = {"group": self.sae.group, "layer": self.sae.layer, "fingerprint": self.sae.fingerprint}
        return data

    @classmethod
    def from_json(cls, data: Any) -> Intervention:
        """What `to_json` wrote.

        Raises:
            FormatError: a key that is missing or unknown, or a value of the wrong kind.
            InputError: values that mean nothing together.
        """
        one = Fields(data, "an intervention", ("hook_point", "op", "amount"), _FIELDS)
        direction = one.maybe(one.numbers, "direction")
        _check_choice("op", one["op"], get_args(Op))
        unit = data.get("unit", "raw")
        _check_choice("unit", unit, get_args(Unit))
        return cls(
            HookPoint.parse(one.text("hook_point")),
            data["op"],
            one.number("amount"),
            one.maybe(one.count, "feature"),
            None if direction is None else _vector(direction),
            unit,
            Where.parse(one.text("where") if "where" in data else "all"),
            one.maybe(lambda key: _identity(one[key]), "sae"),
        )


def _point(layer: int | HookPoint) -> HookPoint:
    return layer if isinstance(layer, HookPoint) else HookPoint(layer)


def _vector(direction: Sequence[float] | Tensor | None) -> tuple[float, ...] | None:
    if direction is None:
        return None
    flat = torch.as_tensor(direction, dtype=torch.float32).detach().cpu()
    if flat.ndim != 1:
        raise InputError(f"a direction is one vector, not a tensor of shape {tuple(flat.shape)}")
    return tuple(flat.tolist())


def _check_choice(what: str, value: Any, known: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in known:
        name = value[:60] if isinstance(value, str) else ""
        raise NotFoundError(f"there is no {what} {brief(value)}; {nearest(name, known)}")


def _identity(data: Any) -> Identity:
    sae = Fields(data, "the SAE of an intervention", ("group", "layer", "fingerprint"))
    return Identity(sae.text("group"), sae.maybe(sae.count, "layer"), sae.text("fingerprint"))

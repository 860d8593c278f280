"""A threshold per feature: what BatchTopK and Matryoshka SAEs become once they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError, MismatchError

from . import kernels
from .acts import FeatureActs
from .base import SAE, UNNAMED, Identity, check_features, check_finite, check_residual, check_weights


@final
@dataclass(frozen=True, eq=False, repr=False)
class JumpReLU(SAE):
    """`a = relu(pre) * 1[pre > threshold]` (Rajamanoharan et al. 2024), `pre` and `x_hat` as in `TopK`.

    How many features are active varies from token to token, so `k` is None and `encode` returns as many slots as
    the fullest token of the batch needs.
    """

    architecture: ClassVar[str] = "jumprelu"
    own: ClassVar[tuple[str, ...]] = ("threshold",)

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor
    hook_point: str | None = None
    identity: Identity = UNNAMED
    meta: Mapping[str, Any] = field(default_factory=dict)
    _finite: set[str] = field(default_factory=set, init=False)
    _encoder: kernels.EncoderCache = field(default_factory=kernels.EncoderCache, init=False)
    k: None = field(default=None, init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        check_weights(self.W_enc, self.W_dec, self.b_enc, self.b_dec)
        if tuple(self.threshold.shape) != (self.d_sae,):
            raise MismatchError(f"threshold must be {(self.d_sae,)}, got {tuple(self.threshold.shape)}")
        if (below := negative(self.threshold)) is not None:
            raise InputError(f"threshold holds {below[1]:g} at position {below[0]}; thresholds are 0 or above")

    def pre_acts(
        self, x: Float[Tensor, "*rows d_model"], features: Sequence[int] | Tensor | None = None
    ) -> Float[Tensor, "*rows n"]:
        check_residual(x, self.d_model)
        if features is None:
            self.check_finite("W_enc")
            return kernels.pre_acts(x, self.W_enc, self.b_enc)
        wanted = check_features(features, self.d_sae, self.device)
        return kernels.pre_acts(x, self.W_enc[wanted], self.b_enc[wanted])

    def encode(self, x: Float[Tensor, "*rows d_model"]) -> FeatureActs:
        check_residual(x, self.d_model)
        self.check_finite("W_enc")
        found = kernels.encode_threshold_chosen(x, self.W_enc, self.b_enc, self.threshold, self._encoder)
        return check_finite(found, x, self)

    @property
    def cached_bytes(self) -> int:
        return self._encoder.nbytes

    def decode(self, acts: FeatureActs) -> Float[Tensor, "*rows d_model"]:
        if acts.width != self.d_sae:
            raise MismatchError(
                f"activations of a {acts.width}-wide dictionary can't be decoded by one of {self.d_sae}"
            )
        self.check_finite("W_dec")
        return kernels.decode(acts, self.W_dec, self.b_dec)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> JumpReLU:
        matrices = {name: getattr(self, name).to(device=device, dtype=dtype) for name in ("W_enc", "W_dec")}
        vectors = {name: getattr(self, name).to(device=device) for name in ("b_enc", "b_dec", "threshold")}
        return replace(self, **matrices, **vectors)

    @classmethod
    def problem(cls, tensors: Mapping[str, Tensor]) -> str | None:
        if (below := negative(tensors["threshold"])) is None:
            return None
        return (
            f"threshold holds {below[1]:g} at position {below[0]}; thresholds are 0 or above, so the file is damaged or"
            " keeps them in another way, such as their logarithm"
        )

    __repr__ = SAE.__str__


def negative(threshold: Tensor) -> tuple[int, float] | None:
    """Where a threshold lies below zero, and how far: ReLU would make it zero without a word."""
    if threshold.device.type == "meta":
        return None
    where = (threshold < 0).flatten().nonzero()
    return (int(where[0]), float(threshold.flatten()[where[0]])) if len(where) else None

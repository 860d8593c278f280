"""The released kind: the k largest rectified pre-activations of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError, MismatchError, brief

from . import kernels
from .acts import FeatureActs
from .base import SAE, UNNAMED, Identity, check_features, check_finite, check_residual, check_weights


@final
@dataclass(frozen=True, eq=False, repr=False)
class TopK(SAE):
    """`a = relu(pre)` on the k largest pre-activations, `pre = x @ W_enc.T + b_enc`, `x_hat = W_dec a + b_dec`.

    The residual is read raw: no subtraction of `b_dec` and no normalisation (the model card of Qwen-Scope).
    ReLU comes before the choice, as in the official demo; the card's snippet leaves it out, which differs only
    on tokens with fewer than k positive pre-activations.
    """

    architecture: ClassVar[str] = "topk"
    fixed_k: ClassVar[bool] = True

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    k: int  # pyright: ignore[reportIncompatibleVariableOverride]  # frozen, so a narrower type is safe
    hook_point: str | None = None
    identity: Identity = UNNAMED
    meta: Mapping[str, Any] = field(default_factory=dict)
    _finite: set[str] = field(default_factory=set, init=False)
    _encoder: kernels.EncoderCache = field(default_factory=kernels.EncoderCache, init=False)

    def __post_init__(self) -> None:
        check_weights(self.W_enc, self.W_dec, self.b_enc, self.b_dec)
        whole = isinstance(self.k, Integral) and not isinstance(self.k, bool)
        if not whole or not 1 <= self.k <= self.d_sae:
            raise InputError(f"k must be between 1 and the number of features, {self.d_sae}; got {brief(self.k)}")

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
        return check_finite(kernels.encode_topk_chosen(x, self.W_enc, self.b_enc, self.k, self._encoder), x, self)

    @property
    def encode_stats(self) -> kernels.EncodeStats | None:
        """Which path the last `encode` of this object took, and how many rows fell back; None before the first."""
        return self._encoder.stats

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

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TopK:
        matrices = {name: getattr(self, name).to(device=device, dtype=dtype) for name in ("W_enc", "W_dec")}
        vectors = {name: getattr(self, name).to(device=device) for name in ("b_enc", "b_dec")}
        return replace(self, **matrices, **vectors)

    __repr__ = SAE.__str__

"""Which tokens count for features; extraction, training and evaluation leave out the same ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import InputError
from qwen_scope.text import special_ids


@dataclass(frozen=True)
class TokenMask:
    """Tokens that are left out: special ones, and sinks, whose residual is many times as long as that of the others.

    Qwen3's first tokens, and a few at any place, reach 10 to over 100 times the median norm (`dictionary_learning`
    drops activations above 10 times it); they would outweigh all others in a loss or a mean.

    Attributes:
        special: token ids that do not count.
        sink_multiple: a token of a norm above so many times the median of its layer is a sink; None calls none one.

    Raises:
        InputError: a multiple that would leave out ordinary tokens.
    """

    special: frozenset[int] = frozenset()
    sink_multiple: float | None = None

    def __post_init__(self) -> None:
        if self.sink_multiple is not None and not self.sink_multiple > 1:
            raise InputError(f"a sink_multiple of {self.sink_multiple} would leave out ordinary tokens; 10 is usual")

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, skip_special: bool, sink_multiple: float | None) -> TokenMask:
        """With the special tokens of a tokenizer, or with none."""
        return cls(special_ids(tokenizer) if skip_special else frozenset(), sink_multiple)

    def special_at(self, ids: Int[Tensor, "*any"]) -> Bool[Tensor, "*any"]:
        """Where special tokens stand."""
        return torch.isin(ids, torch.tensor(sorted(self.special), dtype=ids.dtype, device=ids.device))

    def sinks_at(self, h: Float[Tensor, "*any d_model"], median: float) -> Bool[Tensor, "*any"]:
        """Where sinks stand among residuals of a layer whose median norm is `median`; NaN is none."""
        if self.sink_multiple is None:
            return torch.zeros(h.shape[:-1], dtype=torch.bool, device=h.device)
        return torch.linalg.vector_norm(h.float(), dim=-1) > self.sink_multiple * median

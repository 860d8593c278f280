"""What reads the residual stream for an extraction: an object with one method, so that other engines fit as well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from qwen_scope.model import HookPoint, capture
from qwen_scope.text import by_length, padded

Batch = tuple[list[int], dict[HookPoint, Tensor]]
"""Which rows were read together, and per hook point their tokens' residuals one after the other, `(tokens, d_model)`,
in the order of the rows."""


@runtime_checkable
class Engine(Protocol):
    """Turns rows of tokens into residuals. SAEs, which tokens count, and the store are not its concern."""

    def activations(self, rows: Sequence[Sequence[int]], points: Sequence[HookPoint]) -> Iterator[Batch]:
        """Read every row once, in any order and in batches of any size.

        Args:
            rows: token ids, each row from the beginning of the model's context.
            points: where to read.
        """
        ...


class ModelEngine:
    """The default: forward passes of a transformers model, rows of like length together.

    Args:
        batch_tokens: tokens per forward pass, padding included.
    """

    def __init__(self, model: nn.Module, batch_tokens: int = 4096) -> None:
        self.model, self.batch_tokens = model, batch_tokens

    def activations(self, rows: Sequence[Sequence[int]], points: Sequence[HookPoint]) -> Iterator[Batch]:
        """As `Engine`."""
        for batch in by_length([len(row) for row in rows], self.batch_tokens):
            ids, mask = padded([rows[i] for i in batch])
            found = capture(self.model, ids, points, mask)
            real = mask.bool()
            yield batch, {point: h[real.to(h.device)] for point, h in found.items()}

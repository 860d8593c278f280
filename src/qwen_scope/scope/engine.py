"""What reads the residual stream for an extraction: an object with one method, so that other engines fit as well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from qwen_scope.model import HookPoint, capture, capture_pieces
from qwen_scope.text import by_length, padded

Batch = tuple[list[int], dict[HookPoint, Tensor]]
"""Which rows were read together, and per hook point their tokens' residuals one after the other, `(tokens, d_model)`,
in the order of the rows. A row that is longer than a forward pass may come in pieces: batches of that row alone, one
after the other, until all of its tokens have come."""

# Tokens of a piece of a longer row: their mask against all tokens before them stays small.
PIECE = 2048


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
    """The default: forward passes of a transformers model, rows of like length together, and longer ones in pieces.

    Args:
        batch_tokens: tokens per forward pass, padding included.
    """

    def __init__(self, model: nn.Module, batch_tokens: int = 4096) -> None:
        self.model, self.batch_tokens = model, batch_tokens

    def activations(self, rows: Sequence[Sequence[int]], points: Sequence[HookPoint]) -> Iterator[Batch]:
        """As `Engine`."""
        for batch in by_length([len(row) for row in rows], self.batch_tokens):
            if len(rows[batch[0]]) > self.batch_tokens:  # such a row is alone
                whole = torch.tensor([rows[batch[0]]], dtype=torch.int64)
                for piece in capture_pieces(self.model, whole, points, min(self.batch_tokens, PIECE)):
                    yield batch, {point: h[0] for point, h in piece.items()}
                continue
            ids, mask = padded([rows[i] for i in batch])
            found = capture(self.model, ids, points, mask)
            real = mask.bool()
            yield batch, {point: h[real.to(h.device)] for point, h in found.items()}

"""Residuals that fit in memory, served as shuffled batches with a cursor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qwen_scope.errors import InputError, check_count


class ResidualTable:
    """Residuals of several hook points held in memory, in shuffled batches, epoch after epoch without end.

    Every hook point sees the same tokens in the same order.

    Args:
        residuals: `(tokens, d_model)` per hook point, all with the same number of tokens.
        batch: tokens per batch; the tail of an epoch that does not fill a batch is left out of that epoch.
        seed: of the order.

    Raises:
        InputError: no residuals, different numbers of tokens, or fewer tokens than one batch.
    """

    def __init__(self, residuals: Mapping[str, Tensor], batch: int = 4096, seed: int = 0) -> None:
        check_count("batch", batch)
        lengths = {name: len(tensor) for name, tensor in residuals.items()}
        if len(set(lengths.values())) != 1:
            raise InputError(f"every hook point needs the same tokens, got {lengths or 'no hook points'}")
        self.residuals = dict(residuals)
        self.batch, self.seed = batch, seed
        self.tokens = next(iter(lengths.values()))
        if self.tokens < batch:
            raise InputError(
                f"{self.tokens} residuals are fewer than one batch of {batch}; lower the batch or add text"
            )
        self.epoch, self.next_batch = 0, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            order = torch.randperm(
                self.tokens, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            )
            while (self.next_batch + 1) * self.batch <= self.tokens:
                chosen = order[self.next_batch * self.batch :][: self.batch]
                self.next_batch += 1
                yield {name: tensor[chosen] for name, tensor in self.residuals.items()}
            self.epoch, self.next_batch = self.epoch + 1, 0

    def cursor(self) -> dict[str, Any]:
        """Where the next batch is, as plain data."""
        return {"epoch": self.epoch, "next_batch": self.next_batch}

    def seek(self, cursor: Mapping[str, Any]) -> None:
        """Go on from a cursor."""
        self.epoch, self.next_batch = int(cursor["epoch"]), int(cursor["next_batch"])

"""Residuals of all chosen layers from one forward pass each, shuffled within a memory budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, capture, d_model
from qwen_scope.text import REASONS, Counted, TokenRows, tally


class ResidualBuffer:
    """Batches of residuals for training, from a model and its token rows.

    The buffer is filled, shuffled and served whole before it is filled again, so its whole state is the cursor of the
    tokens it was filled from and the number of batches served: a resumed run fills it once more instead of storing it.
    Every hook point sees the same tokens in the same order. Tokens that do not count by their place or id are left out,
    and what does not fill a last batch; sinks at other places stay, since they differ between layers.

    Args:
        hook_points: the layers, all read in one forward pass that stops after the deepest.
        batch: tokens per batch that this process gets.
        budget: bytes the stored residuals may take.
        most: tokens that will be asked for in all, so that a short run fills no larger buffer than it needs.
        seed: of the order within each filling.
        counted: which tokens count.
        dtype: how residuals are stored; batches come in fp32.
        device: where they are stored, by default the CPU.

    Attributes:
        read: how many tokens were read, by `text.REASONS`, up to the end of the present filling.

    Raises:
        InputError: no hook points, rows without a token that counts, or a budget too small for one batch.
        NotFoundError: a layer that the model does not have (at the first batch).
    """

    def __init__(
        self, model: nn.Module, rows: TokenRows, hook_points: Sequence[HookPoint], *, batch: int = 4096,
        budget: int = 2**30, most: int | None = None, seed: int = 0, counted: Counted = Counted(),  # noqa: B008 - frozen
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if not hook_points:
            raise InputError("a buffer needs at least one hook point, such as HookPoint(0)")
        self.model, self.rows, self.hook_points = model, rows, list(hook_points)
        self.batch, self.seed, self.dtype, self.device = batch, seed, dtype, device
        self.counted = counted
        self.per_token = len(self.hook_points) * d_model(model) * dtype.itemsize
        forward = rows.batch_size * rows.context_length
        passes = budget // (self.per_token * forward)
        counting = rows.batch_size * max(0, rows.context_length - counted.first)
        # Half of a filling may be special before one batch is missing.
        wanted = 2 * batch if counted.special else batch
        if not counting:
            raise InputError(f"rows of {rows.context_length} tokens hold none that counts; make them longer")
        if passes < 1 or passes * counting < wanted:
            least = self.per_token * (-(-wanted // counting)) * forward
            raise InputError(f"a buffer of {budget:,} bytes is too small for one batch; give it {least:,}")
        if most is not None:
            # A full batch more than is needed: a filling leaves out what does not fill a last batch.
            passes = min(passes, -(-(most + wanted) // counting))
        # Of the fillings that use at least half of the budget, the one that wastes the fewest tokens.
        self.passes = min(
            range(passes, passes // 2, -1), key=lambda p: (p * counting) % batch if p * counting >= batch else batch
        )
        self.filling, self.served = 0, 0
        self.filled_from = rows.cursor()
        self.read_before = self.read = dict.fromkeys(REASONS, 0)

    @property
    def tokens(self) -> int:
        """Tokens of one filling."""
        return self.passes * self.rows.batch_size * self.rows.context_length

    @property
    def nbytes(self) -> int:
        """Bytes of the stored residuals when the buffer is full."""
        return self.tokens * self.per_token

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        stored: dict[str, Tensor] = {}
        stream = iter(self.rows)
        while True:
            self.filled_from = self.rows.cursor()
            held = self.fill(stored, stream)
            if held < self.batch:
                if self.filling == 0:
                    raise InputError(
                        f"the texts hold {held} tokens that count in full rows, less than one batch of {self.batch}"
                    )
                return
            order = torch.randperm(held, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.filling))
            while (self.served + 1) * self.batch <= held:
                chosen = order[self.served * self.batch :][: self.batch].to(self.device)
                self.served += 1
                yield {name: tensor[chosen].float() for name, tensor in stored.items()}
            self.filling, self.served, self.read_before = self.filling + 1, 0, self.read

    def fill(self, stored: dict[str, Tensor], stream: Iterator[Tensor]) -> int:
        """Run the model until the buffer is full or the texts end; returns the tokens held."""
        held = 0
        self.read = self.read_before
        for _ in range(self.passes):
            ids = next(stream, None)
            if ids is None:
                break
            reasons = self.counted.reasons(ids)
            keep = reasons == 0
            found = tally(reasons)
            self.read = {reason: n + found[reason] for reason, n in self.read.items()}
            for point, h in capture(self.model, ids, self.hook_points).items():
                flat = h[keep.to(h.device)]
                if str(point) not in stored:
                    stored[str(point)] = torch.empty(self.tokens, flat.shape[1], dtype=self.dtype, device=self.device)
                stored[str(point)][held : held + len(flat)] = flat.to(self.device, self.dtype)
            held += int(keep.sum())
        return held

    def cursor(self) -> dict[str, Any]:
        """Where the present filling began, how much of it is served, and what was read before and in all."""
        return {
            "rows": self.filled_from, "filling": self.filling, "served": self.served,
            "read_before": self.read_before, "read": self.read,
        }  # fmt: skip

    def seek(self, cursor: Mapping[str, Any]) -> None:
        """Go on from a cursor; to be called before the first batch is taken."""
        self.rows.seek(cursor["rows"])
        self.filling, self.served = int(cursor["filling"]), int(cursor["served"])
        self.read_before, self.read = dict(cursor["read_before"]), dict(cursor["read"])

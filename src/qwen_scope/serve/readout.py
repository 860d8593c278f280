"""`Readouts`: activations that requests asked for, until the server fetches them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen_scope.sae import SAE
from qwen_scope.steer import SAEsByLayer, activations

from .bounds import readable
from .protocol import Read

MOST_TICKETS = 4096
MOST_BYTES = 2**29
"""Of activations that are kept, about; the oldest tickets go first, and are told so when they are fetched."""

ROW, NUMBER = 400, 8
"""Bytes of a token's activations at one layer, about, and of each of them."""

LOST = "lost"
"""In place of requests, where a ticket's activations had to go."""

Row = tuple[np.ndarray, np.ndarray]
"""Features and values of one token at one layer."""


@dataclass(frozen=True, eq=False)
class Pending:
    """Rows of a step that were asked for.

    Attributes:
        ticket: under which they are kept.
        name: of the request.
        read: what of them.
        rows: their places in the step.
        positions: their positions in the request.
    """

    ticket: str
    name: str
    read: Read
    rows: np.ndarray
    positions: np.ndarray


class Readouts:
    """By ticket, request and layer: position to features and values."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, dict[str, dict[int, dict[int, Row]]]] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._closed: OrderedDict[str, str] = OrderedDict()  # nothing more is kept for these; why, if it was fetched

    @property
    def held(self) -> int:
        """Tickets that wait."""
        return len(self._kept)

    def keep(self, pending: Sequence[Pending], taps: Mapping[int, Tensor], saes: SAEsByLayer) -> None:
        """Encode the rows that were asked for, each layer at once."""
        pending = [one for one in pending if one.ticket not in self._closed]
        for layer, buffer in taps.items():
            tops = [one for one in pending if layer in one.read.layers and one.read.top is not None]
            named = [one for one in pending if layer in one.read.layers and one.read.top is None]
            if tops:
                self._keep_tops(layer, tops, buffer, saes[layer])
            if named:
                self._keep_named(layer, named, buffer, saes[layer])
        while len(self._kept) > MOST_TICKETS or sum(self._sizes.values()) > MOST_BYTES:
            oldest = next(iter(self._kept))
            self._close(oldest, f"activations of other requests took the room: {MOST_BYTES >> 20} MiB are kept in all")

    def take(self, ticket: str) -> dict[str, Any]:
        """Requests by name, of each its layers, of each the positions in order with features and values.

        Where they had to go, `LOST` and why.
        """
        if why := self._closed.pop(ticket, None):
            return {LOST: why}
        self._sizes.pop(ticket, None)
        found = self._kept.pop(ticket, {})
        return {
            name: {
                str(layer): {
                    "positions": sorted(rows),
                    "features": [rows[position][0].tolist() for position in sorted(rows)],
                    "values": [rows[position][1].tolist() for position in sorted(rows)],
                }
                for layer, rows in layers.items()
            }
            for name, layers in found.items()
        }

    def drop(self, ticket: str) -> None:
        """Nobody will fetch it, whatever is still read for it."""
        self._close(ticket, "its client had gone")

    def _close(self, ticket: str, why: str) -> None:
        self._kept.pop(ticket, None)
        self._sizes.pop(ticket, None)
        self._closed[ticket] = why
        while len(self._closed) > MOST_TICKETS:
            self._closed.popitem(last=False)

    def _keep_tops(self, layer: int, pending: Sequence[Pending], buffer: Tensor, sae: SAE) -> None:
        h, fine = _gathered(pending, buffer)
        acts = sae.encode(h)
        most = max(one.read.top or 0 for one in pending)
        values = (acts.values[:, :most].float() * fine[:, None].to(acts.values.device)).cpu().numpy()
        features = acts.indices[:, :most].cpu().numpy()
        start = 0
        for one in pending:
            into = self._rows(one, layer)
            for j, position in enumerate(one.positions.tolist(), start):
                on = np.flatnonzero(values[j, : one.read.top] > 0)
                into[position] = features[j, on], values[j, on]
                self._sizes[one.ticket] += ROW + NUMBER * len(on)
            start += len(one.positions)

    def _keep_named(self, layer: int, pending: Sequence[Pending], buffer: Tensor, sae: SAE) -> None:
        h, fine = _gathered(pending, buffer)
        wanted = sorted({feature for one in pending for feature in one.read.named_at(layer)})
        found = activations(sae, h, wanted)
        values = (found * fine[:, None].to(found.device)).cpu().numpy()
        start = 0
        for one in pending:
            mine = np.array(one.read.named_at(layer))
            columns = np.searchsorted(wanted, mine)
            into = self._rows(one, layer)
            for j, position in enumerate(one.positions.tolist(), start):
                into[position] = mine, values[j, columns]
                self._sizes[one.ticket] += ROW + NUMBER * len(mine)
            start += len(one.positions)

    def _rows(self, one: Pending, layer: int) -> dict[int, Row]:
        self._sizes.setdefault(one.ticket, 0)
        return self._kept.setdefault(one.ticket, {}).setdefault(one.name, {}).setdefault(layer, {})


def _gathered(pending: Sequence[Pending], buffer: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that were asked for in fp32, and which can be read; of one that can't, nothing is active."""
    rows = torch.from_numpy(np.concatenate([one.rows for one in pending])).to(buffer.device)
    h = buffer[rows].float()
    fine = readable(h)
    return torch.where(fine[:, None], h, 0), fine

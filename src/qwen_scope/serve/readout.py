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
MOST_NUMBERS = 64 * 10**6
"""Activations that are kept; the oldest tickets go first, so a client that left costs nothing for long."""


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
        self._kept: OrderedDict[str, dict[str, dict[int, dict[int, tuple[list[int], list[float]]]]]] = OrderedDict()
        self._sizes: dict[str, int] = {}

    @property
    def held(self) -> int:
        """Tickets that wait."""
        return len(self._kept)

    def keep(self, pending: Sequence[Pending], taps: Mapping[int, Tensor], saes: SAEsByLayer) -> None:
        """Encode the rows that were asked for, each layer at once."""
        for layer, buffer in taps.items():
            tops = [one for one in pending if layer in one.read.layers and one.read.top is not None]
            named = [one for one in pending if layer in one.read.layers and one.read.top is None]
            if tops:
                self._keep_tops(layer, tops, buffer, saes[layer])
            if named:
                self._keep_named(layer, named, buffer, saes[layer])
        while len(self._kept) > MOST_TICKETS or sum(self._sizes.values()) > MOST_NUMBERS:
            oldest, _ = self._kept.popitem(last=False)
            del self._sizes[oldest]

    def take(self, ticket: str) -> dict[str, Any]:
        """Requests by name, of each its layers, of each the positions in order with features and values."""
        self._sizes.pop(ticket, None)
        found = self._kept.pop(ticket, {})
        return {
            name: {
                str(layer): {
                    "positions": sorted(rows),
                    "features": [rows[position][0] for position in sorted(rows)],
                    "values": [rows[position][1] for position in sorted(rows)],
                }
                for layer, rows in layers.items()
            }
            for name, layers in found.items()
        }

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
                into[position] = features[j, on].tolist(), values[j, on].tolist()
                self._sizes[one.ticket] += len(on) + 1
            start += len(one.positions)

    def _keep_named(self, layer: int, pending: Sequence[Pending], buffer: Tensor, sae: SAE) -> None:
        h, fine = _gathered(pending, buffer)
        wanted = sorted({feature for one in pending for feature in one.read.named_at(layer)})
        found = activations(sae, h, wanted)
        values = (found * fine[:, None].to(found.device)).cpu().numpy()
        start = 0
        for one in pending:
            mine = one.read.named_at(layer)
            columns = np.searchsorted(wanted, mine)
            into = self._rows(one, layer)
            for j, position in enumerate(one.positions.tolist(), start):
                into[position] = mine, values[j, columns].tolist()
                self._sizes[one.ticket] += len(mine) + 1
            start += len(one.positions)

    def _rows(self, one: Pending, layer: int) -> dict[int, tuple[list[int], list[float]]]:
        self._sizes.setdefault(one.ticket, 0)
        return self._kept.setdefault(one.ticket, {}).setdefault(one.name, {}).setdefault(layer, {})


def _gathered(pending: Sequence[Pending], buffer: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that were asked for in fp32, and which can be read; of one that can't, nothing is active."""
    rows = torch.from_numpy(np.concatenate([one.rows for one in pending])).to(buffer.device)
    h = buffer[rows].float()
    fine = readable(h)
    return torch.where(fine[:, None], h, 0), fine

"""`Tables`: what is added at each layer, one row for each thing that the requests of a step may add."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .compiled import Compiled


class Tables:
    """Per layer `(capacity, d_model)`, all with the same rows; row 0 adds nothing and is never written.

    A row belongs to a recipe and a code. Rows of recipes that no request of the step has are taken back when others
    need them, so a capacity of 1 + rows per request * requests in a step always suffices.
    """

    def __init__(
        self, layers: Sequence[int], capacity: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.by_layer: dict[int, Tensor] = {
            layer: torch.zeros(capacity, width, dtype=dtype, device=device) for layer in layers
        }
        self.capacity = capacity
        self._free = list(range(capacity - 1, 0, -1))
        self._rows: OrderedDict[str, dict[int, int]] = OrderedDict()  # by recipe, the one used last at the end

    @property
    def free(self) -> int:
        """Rows that belong to nobody."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Of all layers."""
        return sum(table.numel() * table.element_size() for table in self.by_layer.values())

    def row(self, compiled: Compiled, code: int, busy: Collection[str]) -> int:
        """The row of what a token of this code adds, written if it is not there yet.

        Args:
            busy: the keys of the recipes of this step, whose rows stay.
        """
        if code == 0:
            return 0
        rows = self._rows.setdefault(compiled.key, {})
        self._rows.move_to_end(compiled.key)
        if code not in rows:
            if not self._free:
                self._take_back({*busy, compiled.key})
            rows[code] = row = self._free.pop()
            for layer, table in self.by_layer.items():
                vector = compiled.vector(layer, code)
                table[row].zero_() if vector is None else table[row].copy_(vector)
        return rows[code]

    def _take_back(self, busy: Collection[str]) -> None:
        for key in [key for key in self._rows if key not in busy]:
            self._free += self._rows.pop(key).values()
            if self._free:
                return
        raise AssertionError(f"no row of {self.capacity} is free: admission bounds what a request needs")

"""Turns, roles and phases of a store's tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from qwen_scope.errors import NotFoundError
from qwen_scope.text import PHASES, phase_numbers

from .parts import TableRows


def check_phases(spans: TableRows, phases: Iterable[str], folder: object) -> list[str]:
    """The phases in the order of `PHASES`.

    Raises:
        InputError: none, or one that there is not.   NotFoundError: the store tells no phases.
    """
    numbers = phase_numbers(phases)
    if not spans.rows:
        raise NotFoundError(f"{folder} does not tell the phases of its documents; read the corpus again with extract")
    return [PHASES[i] for i in numbers]


class Spans:
    """All spans of a store in memory, to tell the phase of a token: 16 bytes a span.

    Args:
        rows: the table `spans`.
    """

    def __init__(self, rows: TableRows) -> None:
        table = rows.read(0, rows.rows, ["document", "position", "tokens", "phase"])
        columns = ("document", "position", "tokens")
        document, position, tokens = (table[name].to_numpy().astype(np.int64) for name in columns)
        named = table["phase"].to_pylist()
        self._starts, self._stops = document << 32 | position, document << 32 | position + tokens
        self._phases = np.array([PHASES.index(name) if name in PHASES else -1 for name in named], np.int64)

    def phases(self, document: Int[np.ndarray, " n"], position: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Indices into `PHASES`, `(n,)`; -1 for a token of no span."""
        places = document.astype(np.int64) << 32 | position.astype(np.int64)
        if not len(self._starts):
            return np.full(len(places), -1)
        at = np.maximum(np.searchsorted(self._starts, places, side="right") - 1, 0)
        inside = (places >= self._starts[at]) & (places < self._stops[at])
        return np.where(inside, self._phases[at], -1)

    def within(
        self, document: Int[np.ndarray, " n"], position: Int[np.ndarray, " n"], phases: Sequence[str]
    ) -> Bool[np.ndarray, " n"]:
        """Whether each token is of one of the phases."""
        return np.isin(self.phases(document, position), phase_numbers(phases))

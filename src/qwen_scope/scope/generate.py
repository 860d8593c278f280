"""What a scope needs to steer: its own SAEs, and the statistics of its layers, measured once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen_scope.model import LayerStats
from qwen_scope.steer import Decoding, Generation, Intervention, calibrate, generate

if TYPE_CHECKING:
    from .scope import Scope


class ScopeStats:
    """`stats[layer]`: the layer's statistics, measured on first use and kept; safe to share between threads.

    Measured on the built-in sample of texts, unless `set` brings figures of a better one.
    """

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._held: dict[int, LayerStats] = {}
        self._lock = threading.Lock()

    def __getitem__(self, layer: int) -> LayerStats:
        with self._lock:
            if layer not in self._held:
                scope = self._scope
                sae = scope.saes[layer] if layer in scope.saes.layers else None
                self._held[layer] = calibrate(scope.model, scope.tokenizer, layer, sae)
            return self._held[layer]

    def set(self, stats: LayerStats) -> None:
        """Use these figures for their layer from now on."""
        with self._lock:
            self._held[stats.hook_point.layer] = stats


def generate_in_scope(
    scope: Scope,
    prompts: Sequence[str],
    interventions: Sequence[Intervention],
    decoding: Decoding | None,
    chat: str | None,
    candidates: int | None,
) -> list[Generation]:
    """`generate` with the scope's model, SAEs and statistics."""
    return generate(
        scope.model,
        scope.tokenizer,
        prompts,
        interventions,
        saes=scope.saes,
        stats=scope.stats,
        decoding=decoding,
        chat=chat,
        candidates=candidates,
    )

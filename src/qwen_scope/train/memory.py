"""How much memory a run will take at its peak, before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_scope.errors import check_count

from .config import TrainConfig
from .selection import TILE_BYTES

FLOAT = 4


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the training device at the peak of a step, without the language model.

    Attributes:
        weights: parameters of all layers.
        optimiser: Adam's two moments of all layers, and the dead counters.
        gradients: of the one layer that is being updated, and the product that is being added to one of them; or the
            pre-activations that are chosen from before there is a gradient, where those are larger.
        batch: residuals, reconstruction, errors and activations of one layer's batch.
        buffer: stored residuals.
    """

    weights: int
    optimiser: int
    gradients: int
    batch: int
    buffer: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.optimiser + self.gradients + self.batch + self.buffer

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint on disk."""
        return self.weights + self.optimiser


def memory_plan(config: TrainConfig, d_model: int, n_layers: int, *, buffer: int = 2**30, world: int = 1) -> MemoryPlan:
    """The peak of a run on `n_layers` layers that this process trains.

    Args:
        buffer: bytes of stored residuals on the same device (`ResidualBuffer.nbytes`).
        world: among how many processes each dictionary's features are divided.
    """
    for name, value in {"d_model": d_model, "n_layers": n_layers, "world": world}.items():
        check_count(name, value)
    check_count("buffer", buffer, 0)
    d_sae = config.d_sae // world
    matrix, row = FLOAT * d_sae * d_model, FLOAT * config.batch * d_model
    parameters = 2 * matrix + FLOAT * (d_sae + d_model)
    entries = config.batch * (config.k + min(config.k_aux or d_model // 2, d_sae))
    return MemoryPlan(
        weights=n_layers * parameters,
        optimiser=n_layers * (2 * parameters + 12 * d_sae),
        gradients=max(parameters + matrix, TILE_BYTES + TILE_BYTES // 2),
        # The whole batch of all layers, then of one layer: scaled, centred, reconstructed, its error and gradients.
        batch=(n_layers + 6) * row + 24 * entries,
        buffer=buffer,
    )

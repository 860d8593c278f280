"""How much memory a run will take at its peak, before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_scope.errors import check_count

from .config import TrainConfig
from .selection import TILE_BYTES
from .splice import LOGIT_BYTES

if TYPE_CHECKING:
    from qwen_scope.model import ModelSizes

FLOAT = 4
# Python with PyTorch, transformers and the rest, in memory before anything is loaded.
PROCESS = 500 * 2**20
# Logits of a piece in float32, as measured: log-probabilities and probabilities of the model, log-probabilities with
# the reconstruction and with zeros, and what making the last takes.
LOGITS = 7


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


@dataclass(frozen=True)
class RunPlan:
    """Bytes of a whole run on one device, language model and all.

    Attributes:
        process: Python and its packages, where the device is the CPU.
        model: the language model.
        layer: what the training of one layer takes, without the buffer.
        steps: of all layers together, with the buffer.
        capture: the language model at work on one batch.
        measuring: predictions with and without the SAE while it is measured after training.
    """

    process: int
    model: int
    layer: int
    steps: MemoryPlan
    capture: int
    measuring: int

    @property
    def total(self) -> int:
        """The peak: in training or in measuring, which follows it."""
        training = self.steps.total + self.capture
        return self.process + self.model + max(training, self.steps.weights + self.measuring)


def run_plan(
    config: TrainConfig,
    sizes: ModelSizes,
    n_layers: int,
    *,
    dtype: str,
    model: int,
    vocabulary: int,
    buffer: int,
    row: int = 256,
    rows: int = 16,
    on_cpu: bool = True,
) -> RunPlan:
    """The peak of `train` on `n_layers` layers of a language model.

    Args:
        dtype: of the language model.   model: bytes of its weights.   vocabulary: tokens that it knows.
        buffer: the most that stored residuals may take; a run of few tokens stores no more than it needs.
        row, rows: tokens per row and rows per forward pass.
    """
    per_token = n_layers * sizes.d_model * FLOAT
    stored = min(buffer, per_token * (config.tokens + 2 * config.batch))
    one = memory_plan(config, sizes.d_model, 1, buffer=0)
    piece = min(rows, max(1, LOGIT_BYTES // (4 * vocabulary * row)))
    return RunPlan(
        process=PROCESS if on_cpu else 0,
        model=model,
        layer=one.total,
        steps=memory_plan(config, sizes.d_model, n_layers, buffer=stored),
        capture=sizes.capture_bytes(rows, row, n_layers, dtype),
        measuring=LOGITS * 4 * piece * row * vocabulary,
    )


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

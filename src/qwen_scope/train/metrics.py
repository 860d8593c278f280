"""Where the figures of a run go while it runs: one callback per place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_scope.errors import need

from .loop import StepReport


class JsonlMetrics:
    """One line of JSON per logged step, flushed at once: step, tokens, seconds, lr, and per layer the `LayerReport`.

    Args:
        every: log each so-manieth step, and the last.
    """

    def __init__(self, path: Path, every: int = 10) -> None:
        self.path, self.every = path, every

    def __call__(self, report: StepReport) -> None:
        if report.step % self.every == 0 or report.step == report.steps:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(report)) + "\n")


class TensorBoardMetrics:
    """Scalars for TensorBoard, named `layers.3.resid_post/fvu`.

    Raises:
        NotFoundError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, every: int = 10) -> None:
        need("writing for TensorBoard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer, self.every = SummaryWriter(str(folder)), every

    def __call__(self, report: StepReport) -> None:
        if report.step % self.every == 0 or report.step == report.steps:
            for name, value in scalars(report).items():
                self.writer.add_scalar(name, value, report.step)
            self.writer.flush()


class WandbMetrics:
    """Scalars for Weights & Biases, under the same names.

    Args:
        init: passed on to `wandb.init`, such as `project` and `config`.

    Raises:
        NotFoundError: wandb is not installed.
    """

    def __init__(self, init: Mapping[str, Any], every: int = 10) -> None:
        need("logging to Weights & Biases", "wandb")
        import wandb  # pyright: ignore[reportMissingImports]

        self.run, self.every = wandb.init(**init), every

    def __call__(self, report: StepReport) -> None:
        if report.step % self.every == 0 or report.step == report.steps:
            self.run.log(scalars(report), step=report.step)
        if report.step == report.steps:
            self.run.finish()


def scalars(report: StepReport) -> dict[str, float]:
    """Every number of a report under one flat name."""
    flat = {"lr": report.lr, "tokens": float(report.tokens), "tokens_per_s": report.tokens_per_s}
    for layer, figures in report.layers.items():
        flat |= {f"{layer}/{name}": float(value) for name, value in asdict(figures).items()}
    return flat


def read_metrics(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The lines that `JsonlMetrics` wrote, by step, the layers of several ranks joined.

    A resumed run's later line for a step replaces the earlier one.
    """
    found: dict[int, dict[str, Any]] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            layers = found.get(entry["step"], {}).get("layers", {})
            found[entry["step"]] = {**entry, "layers": {**layers, **entry["layers"]}}
    return [found[step] for step in sorted(found)]

"""Where the figures of a run go while it runs: one callback per place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_scope.errors import check_count, need
from qwen_scope.files import Fields, append_lines, parse_object, read_lines, write_text

from .loop import StepReport


class JsonlMetrics:
    """One line of JSON per logged step, on the disk at once: step, tokens, seconds, lr, and by layer the `LayerReport`.

    The first step it is told decides which lines of an earlier part of the run stay: those before it.

    Args:
        every: log every `every`-th step, and the last.
    """

    def __init__(self, path: Path, every: int = 10) -> None:
        self.path, self.every = path, check_count("every", every)
        self._begun = False

    def __call__(self, report: StepReport) -> None:
        if not self._begun:
            lines = read_lines(self.path)
            kept = [line for line in lines if step_of(line, self.path) < report.step]
            if len(kept) < len(lines):
                write_text(self.path, "".join(line + "\n" for line in kept))
            self._begun = True
        if report.step % self.every == 0 or report.step == report.steps:
            append_lines(self.path, [json.dumps(asdict(report))])


def step_of(line: str, path: Path) -> int:
    """The step that a line is about.

    Raises:
        FormatError: it is no line of a run.
    """
    return Fields(parse_object(line, f"a line of {path}"), f"a line of {path}").count("step")


class TensorBoardMetrics:
    """Scalars for TensorBoard, named `layers.3.resid_post/fvu`.

    Raises:
        NotFoundError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, every: int = 10) -> None:
        need("writing for TensorBoard", "tensorboard")
        self.folder, self.every = folder, check_count("every", every)
        self.writer: Any = None

    def __call__(self, report: StepReport) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # What an earlier part of the run logged beyond here is struck out.
            self.writer = SummaryWriter(str(self.folder), purge_step=report.step)
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

        self.every = check_count("every", every)
        self.run = wandb.init(**init)

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

    Of two lines for a step the later one counts.

    Raises:
        FormatError: a line is none of theirs.
    """
    found: dict[int, dict[str, Any]] = {}
    for path in paths:
        for number, line in enumerate(read_lines(path), 1):
            entry = Fields(parse_object(line, f"line {number} of {path}"), f"line {number} of {path}")
            step = entry.count("step")
            layers = found.get(step, {}).get("layers", {})
            found[step] = {**entry.data, "layers": {**layers, **entry.object("layers")}}
    return [found[step] for step in sorted(found)]

"""What fine-tuning and reinforcement learning share as runs on TRL: log, checkpoints, settings, the saved model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from qwen_scope.errors import NotFoundError, QwenScopeError
from qwen_scope.model import LoadedModel


class JsonlLog(TrainerCallback):
    """Writes what the trainer logs to a file, one line at a time, and reports progress."""

    def __init__(self, path: Path, progress: Callable[[int, int, dict[str, float]], None] | None) -> None:
        self.path, self.progress = path, progress

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            last = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
            self.progress(state.global_step, state.max_steps, last)


@contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Say in one sentence what keeps a run from being written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise QwenScopeError(f"{out} can't be written: {said}; go on with --resume where there is room") from error


def trl_settings(run: Any, loaded: LoadedModel) -> dict[str, Any]:
    """The settings that both kinds of run have, in the words of Transformers' `TrainingArguments`."""
    return {
        "output_dir": str(run.out / "checkpoints"),
        "use_cpu": loaded.model.device.type == "cpu",
        "learning_rate": run.lr,
        "warmup_steps": run.warmup,
        "seed": run.seed,
        "activation_checkpointing": run.checkpointing,
        "bf16": run.bf16,
        "save_strategy": "steps" if run.save_every else "no",
        "save_steps": run.save_every or 500,
        "save_total_limit": 2,
        "report_to": list(run.report_to) or "none",
        "disable_tqdm": True,
    }


def adapters(rank: int | None) -> LoraConfig | None:
    """LoRA on every linear layer, or None where all weights are trained."""
    return LoraConfig(r=rank, target_modules="all-linear") if rank else None


def last_checkpoint(out: Path) -> str:
    """The folder that a run goes on from.

    Raises:
        NotFoundError: there is none.
    """
    folder = out / "checkpoints"
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise NotFoundError(f"{folder} holds no checkpoint to go on from; start without --resume")
    return found


def trained_model(trainer: Any, out: Path) -> Any:
    """The trained model without a wrapper; an adapter is saved in `out/adapter` and merged."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        if trainer.is_world_process_zero():
            model.save_pretrained(str(out / "adapter"))
        model = model.merge_and_unload()  # pyright: ignore[reportCallIssue]
    return model


def save_model(model: Any, loaded: LoadedModel, out: Path) -> None:
    """The trained model and its tokenizer in `out/model`, as any command can load them."""
    model.save_pretrained(out / "model")
    loaded.tokenizer.save_pretrained(out / "model")


def write_json(path: Path, value: Any) -> None:
    """JSON that a reader may also read with the eyes."""
    path.write_text(json.dumps(value, indent=1, default=str, ensure_ascii=False) + "\n", encoding="utf-8")

"""What fine-tuning and reinforcement learning share as runs on TRL: folder, log, settings, the saved model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from transformers import TrainerCallback

from qwen_scope.errors import QwenScopeError
from qwen_scope.files import append_lines, lock_folder, read_lines, write_folder, write_text
from qwen_scope.model import LoadedModel
from qwen_scope.report import Progress


class JsonlLog(TrainerCallback):
    """Writes what the trainer logs to a file, one line at a time, and reports progress, with what `said` makes of the
    last line that has a loss.

    A run that goes on first drops the lines after its checkpoint: it is going to write them again.
    """

    def __init__(self, path: Path, progress: Progress | None, said: Callable[[Mapping[str, float]], str]) -> None:
        self.path, self.progress, self.said = path, progress, said

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            # The trainer's own history has an entry for each line.
            keep_lines(self.path, read_lines(self.path)[: len(state.log_history)])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            append_lines(self.path, [json.dumps({"step": state.global_step, **(logs or {})})])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            last = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
            self.progress("training", state.global_step / max(1, state.max_steps), self.said(last))


def keep_lines(path: Path, lines: Sequence[str]) -> None:
    """Make a file of lines hold these alone."""
    write_text(path, "".join(line + "\n" for line in lines))


@contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Hold a run's folder as its only writer, and say in one sentence what keeps the run from being written.

    Of several processes of one run the first holds it. Where nothing was written, the folder goes again.
    """
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock_folder(out) if os.environ.get("RANK", "0") == "0" else nullcontext():
            yield
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise QwenScopeError(f"{out} can't be written: {said}; go on with --resume where there is room") from error
    finally:
        if new:
            remove_empty(out)


_HELD: dict[Path, ExitStack] = {}


def hold(folder: Path) -> None:
    """Hold a folder as its only writer until `release`, where no block spans the time, as in a callback.

    What this process held there before is let go first: a training that failed never came to its end.

    Raises:
        InputError: another process writes to it.
    """
    release(folder)
    stack = ExitStack()
    stack.enter_context(lock_folder(folder))
    _HELD[folder.resolve()] = stack


def release(folder: Path) -> None:
    """Let go of a folder, if it is held."""
    if (held := _HELD.pop(folder.resolve(), None)) is not None:
        held.close()


def remove_empty(folder: Path) -> None:
    """Remove a folder that holds nothing but empty folders."""
    for path in (*(folder.iterdir() if folder.is_dir() else ()), folder):
        with suppress(OSError):
            path.rmdir()


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


def trained_model(trainer: Any, out: Path) -> Any:
    """The trained model without a wrapper; an adapter is saved in `out/adapter` and merged."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        if trainer.is_world_process_zero():
            with write_folder(out / "adapter", replace=True) as part:
                model.save_pretrained(str(part))
        model = model.merge_and_unload()  # pyright: ignore[reportCallIssue]
    return model


def save_model(model: Any, loaded: LoadedModel, out: Path) -> None:
    """The trained model and its tokenizer in `out/model`, as any command can load them."""
    with write_folder(out / "model", replace=True) as part:
        model.save_pretrained(part)
        loaded.tokenizer.save_pretrained(part)


def write_json(path: Path, value: Any) -> None:
    """JSON that a reader may also read with the eyes."""
    write_text(path, json.dumps(value, indent=1, default=str, ensure_ascii=False) + "\n")

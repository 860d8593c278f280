"""Checkpoints of TRL's trainers: each counts once it is whole, and a run that goes on logs what an unbroken one does.

Transformers writes a checkpoint file by file into the folder under its final name, and takes the last such folder for
whole. Here a manifest is written last: its digests say which files belong to the checkpoint. Beside the trainer's own
state it holds `figures.rank0.json` and so on: the sums that the trainer logs means of, which Transformers begins anew
when a run goes on.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qwen_scope.errors import FormatError, NotFoundError, QwenScopeError, QwenScopeWarning, foreign
from qwen_scope.files import Fields, digest_of, read_object, write_text

FORMAT, VERSION = "qwen-scope checkpoint", 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class WholeCheckpoints:
    """Put before one of Transformers' trainers in the bases of a class; its checkpoints are then whole or don't count.

    Attributes:
        run_id: of the run whose checkpoints these are; a run goes on from its own alone.
    """

    run_id: str | None = None
    _begun: float = 0.0
    _before: float = 0.0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trainer: Any = self
        folder = Path(trainer._get_output_dir(trial=trial)) / f"checkpoint-{trainer.state.global_step}"
        if trainer.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, or one that was killed here
        trainer.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)  # pyright: ignore[reportAttributeAccessIssue]
        write_text(folder / _figures(trainer), json.dumps(figures_of(trainer)))
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            seal(folder, self.run_id)
        trainer.accelerator.wait_for_everyone()

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None) -> Any:
        """Train; a run that goes on also goes on with the sums that are logged."""
        trainer: Any = self
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole(Path(trainer.args.output_dir), self.run_id) or True
        self._begun, self._before = time.time(), 0.0
        callback = None
        if isinstance(resume_from_checkpoint, str | Path):
            resume_from_checkpoint = str(resume_from_checkpoint)
            callback = Figures(self, Path(resume_from_checkpoint) / _figures(trainer))
            trainer.add_callback(callback)
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            if callback is not None:
                trainer.remove_callback(callback)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        # The loss at the end is that of all steps, and so is the time they took.
        return super()._finalize_training(trial, num_train_samples, start_time - self._before)  # pyright: ignore[reportAttributeAccessIssue]


class Figures(TrainerCallback):
    """Sets back the sums that a trainer logs means of, once it has begun them anew."""

    def __init__(self, trainer: Any, path: Path) -> None:
        self.trainer, self.path = trainer, path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read them from the checkpoint; one that another number of processes wrote has none for this one."""
        if not self.path.is_file():
            return
        read, trainer = Fields(read_object(self.path), str(self.path)), self.trainer
        trainer._before = read.number("seconds", 0)
        trainer._tr_loss += torch.tensor(read.number("loss_since"), dtype=trainer._tr_loss.dtype)
        trainer._total_loss_scalar = read.number("loss_logged")
        trainer._globalstep_last_logged = read.count("logged_at")
        trainer._initial_global_step = 0  # the mean loss at the end is that of the whole run
        trainer._total_train_tokens = read.count("tokens")
        for name, values in read.object("means").items():
            trainer._metrics["train"][name] = list(values)
        # As a step leaves it: where none is left to do, the end would be logged as an evaluation.
        trainer.model.train()


def figures_of(trainer: Any) -> dict[str, Any]:
    """The sums that a trainer logs means of, as plain data."""
    return {
        "seconds": trainer._before + time.time() - trainer._begun,
        "loss_since": float(trainer._tr_loss),
        "loss_logged": float(trainer._total_loss_scalar),
        "logged_at": int(trainer._globalstep_last_logged),
        "tokens": int(trainer._total_train_tokens),
        "means": {name: [float(one) for one in some] for name, some in trainer._metrics["train"].items()},
    }


def _figures(trainer: Any) -> str:
    return f"figures.rank{trainer.args.process_index}.json"


def seal(folder: Path, run_id: str | None = None) -> None:
    """Put all files of a checkpoint on the disk itself and write its manifest; from here on it counts."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        digest = digest_of(path, sync=True)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    manifest = {"format": FORMAT, "version": VERSION, "run": run_id, "files": files}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def check_whole(folder: Path, run_id: str | None = None) -> None:
    """Refuse a checkpoint that is not whole, or is another run's.

    Raises:
        NotFoundError: it has no manifest: it was never whole, or is being removed.
        FormatError: a file is missing or not the one that its manifest describes.
    """
    read = Fields(read_object(folder / MANIFEST), str(folder / MANIFEST))
    read.header(VERSION, FORMAT)
    if run_id is not None and read["run"] not in (None, run_id):
        raise FormatError(f"{folder} is of an earlier run in this folder")
    for name, facts in read.object("files").items():
        path, file = folder / name, Fields(facts, f"{name} in {folder / MANIFEST}")
        if not path.is_file():
            raise FormatError(f"{folder} lacks {name}")
        with foreign(f"{path} can't be read"):
            same = path.stat().st_size == file.count("bytes") and digest_of(path) == file.text("sha256")
        if not same:
            raise FormatError(f"{path} is not the file that its manifest describes")


def newest_whole(folder: Path, own: str | None = None, *, clean: bool = False) -> Path | None:
    """The newest whole checkpoint in a folder; what was damaged after it was whole is named in a `QwenScopeWarning`.

    Args:
        own: the id of the run whose checkpoints count; None for any.
        clean: remove newer ones that are not whole: the run is going to write them again.
    """
    found = sorted(
        (path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()),
        key=lambda path: int(path.name.removeprefix("checkpoint-")),
        reverse=True,
    )
    for i, path in enumerate(found):
        try:
            check_whole(path, own)
        except NotFoundError:
            continue  # whoever wrote it was killed before the end
        except FormatError as error:
            warnings.warn(f"{path.name} is passed over: {error}", QwenScopeWarning, 3)
            continue
        for broken in found[:i] if clean else ():
            shutil.rmtree(broken, ignore_errors=True)
        return path
    return None


def last_checkpoint(out: Path, *, clean: bool = True) -> Path | None:
    """Where a run goes on: its newest whole checkpoint. None where it has begun and has none yet.

    Raises:
        NotFoundError: `out` holds no run and no checkpoint.
    """
    folder, own = out / "checkpoints", run_id(out)
    if (found := newest_whole(folder, own, clean=clean)) is not None:
        return found
    if own is None:
        raise NotFoundError(f"{folder} holds no checkpoint to go on from; start without --resume")
    warnings.warn(f"{folder} holds no whole checkpoint; the run begins at its first step", QwenScopeWarning, 2)
    return None


def run_id(out: Path) -> str | None:
    """The id of the run in a folder, by its `run.json`; None where there is none, or it was written without one."""
    try:
        found: Mapping[str, Any] = read_object(out / "run.json")
    except QwenScopeError:
        return None
    return found["id"] if isinstance(found.get("id"), str) else None

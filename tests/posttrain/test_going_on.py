"""A run that was killed goes on to what an unbroken run leaves; a checkpoint counts once it is whole; one writer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import posttrain_tiny as small
import pytest
import tiny

from qwen_scope.cli import main
from qwen_scope.errors import FormatError, InputError, NotFoundError, QwenScopeWarning
from qwen_scope.files import lock_folder
from qwen_scope.posttrain import SFTRun, read_monitor, run_sft
from qwen_scope.posttrain.checkpoints import MANIFEST, check_whole, last_checkpoint
from qwen_scope.train import DivergedError

CLOCKS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "seconds")
CLOCKS += ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
PROBE = ["The weather is fine today.", "Where is the station?", "今天天气很好。"]


def told(out: Path, **more: Any) -> SFTRun:
    """Six steps, a checkpoint after every second, a line of the log after every third."""
    plain: dict[str, Any] = {"batch": 4, "accumulate": 1, "epochs": 3, "warmup": 0, "max_length": 48, "lr": 1e-3}
    plain |= {"save_every": 2, "log_every": 3, "watch_every": 1, "device": "cpu"}
    return SFTRun(str(tiny.folder() / "model"), out, **{"method": "plain"} | plain | more)


def train(out: Path, **more: Any) -> dict[str, Any]:
    run = told(out, **more)
    held_out = small.ROWS[:2]
    return run_sft(run, small.ROWS, held_out, small.table(), probe=PROBE)


FEATURES = {"method": "features", "sae": str(tiny.folder() / "sae"), "weight": 0.3}


def lines(path: Path) -> list[dict[str, Any]]:
    """A journal without what a clock says."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An unbroken run, with all its checkpoints' places."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out, **FEATURES)
    return out


def same_as(whole: Path, part: Path) -> None:
    for name in ("log.jsonl", "monitor.jsonl"):
        assert lines(part / name) == lines(whole / name), name
    assert (part / "metrics.json").read_text() == (whole / "metrics.json").read_text()
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (whole, part)]
    assert weights[0] == weights[1]


def copy_of(whole: Path, out: Path) -> Path:
    """What a run leaves that was killed at its end, before it wrote its result."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    (out / "metrics.json").unlink()
    return out


@pytest.mark.slow
def test_a_run_that_goes_on_reports_what_an_unbroken_one_does(whole: Path, tmp_path: Path) -> None:
    """From the checkpoint of step 4, in the middle of what one line of the log is the mean of."""
    out = copy_of(whole, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    train(out, **FEATURES, resume=True)
    same_as(whole, out)
    assert [line["step"] for line in lines(out / "log.jsonl")] == [3, 6, 6, 6]


@pytest.mark.slow
def test_so_does_one_that_had_only_to_write_its_result(whole: Path, tmp_path: Path) -> None:
    out = copy_of(whole, tmp_path / "run")
    train(out, **FEATURES, resume=True)
    same_as(whole, out)


@pytest.mark.slow
def test_means_that_wait_for_the_last_line_are_in_it(tmp_path: Path) -> None:
    """No line of the log before the end: what all steps gave is told there, also by a run with no step left to do."""
    train(tmp_path / "whole", **FEATURES, log_every=10)
    out = copy_of(tmp_path / "whole", tmp_path / "run")
    train(out, **FEATURES, log_every=10, resume=True)
    assert lines(out / "log.jsonl") == lines(tmp_path / "whole" / "log.jsonl")
    assert "entropy" in lines(out / "log.jsonl")[0]


NAMES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
NAMES += ("training_args.bin", "figures.rank0.json", "config.json", "tokenizer.json")


@pytest.mark.parametrize("harm", ["gone", "torn", "one byte"])
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_checkpoint_is_passed_over(whole: Path, tmp_path: Path, name: str, harm: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(whole / "run.json", tmp_path)
    for step in (4, 6):
        shutil.copytree(whole / "checkpoints" / f"checkpoint-{step}", tmp_path / "checkpoints" / f"checkpoint-{step}")
    path = tmp_path / "checkpoints" / "checkpoint-6" / name
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] + (b"" if harm == "torn" else bytes([data[len(data) // 2] ^ 1])))
        if harm == "one byte":
            path.write_bytes(path.read_bytes() + data[len(data) // 2 + 1 :])
    with pytest.warns(QwenScopeWarning, match="checkpoint-6 is passed over"):
        found = last_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoints" / "checkpoint-4"
    assert not path.parent.exists(), "it is going to be written again"


def test_what_has_no_manifest_never_was_whole(whole: Path, tmp_path: Path) -> None:
    out = copy_of(whole, tmp_path / "run")
    (out / "checkpoints" / "checkpoint-6" / MANIFEST).unlink()
    assert last_checkpoint(out, clean=False) == out / "checkpoints" / "checkpoint-4"
    (out / "checkpoints" / "checkpoint-4" / MANIFEST).unlink()
    with pytest.warns(QwenScopeWarning, match="no whole checkpoint; the run begins"):
        assert last_checkpoint(out) is None
    assert (out / "checkpoints" / "checkpoint-4").exists(), "nothing is removed where nothing replaces it"
    (out / "run.json").unlink()
    with pytest.raises(NotFoundError, match="no checkpoint to go on from"):
        last_checkpoint(out)


def test_a_run_goes_on_from_its_own_checkpoints_alone(whole: Path, tmp_path: Path) -> None:
    """An earlier run's lie in the folder; the new one was killed before its first."""
    out = copy_of(whole, tmp_path / "run")
    facts = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(facts | {"id": "another"}))
    with pytest.warns(QwenScopeWarning) as said:
        assert last_checkpoint(out) is None
    assert [("earlier run" in str(one.message)) for one in said] == [True, True, False]


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"format": "qwen-scope checkpoint", "version": true, "run": null, "files": {}}']
)
def test_a_manifest_that_is_none(tmp_path: Path, manifest: str) -> None:
    (tmp_path / MANIFEST).write_text(manifest)
    with pytest.raises(FormatError):
        check_whole(tmp_path)


KILLED = """
import os, sys, signal
from pathlib import Path
sys.path[:0] = {paths!r}
import test_going_on as here
from qwen_scope.posttrain import checkpoints
import torch, transformers

at, count, real = int(sys.argv[2]), [0], {{}}
def counted(name, function):
    def call(*args, **kwargs):
        count[0] += 1
        if count[0] == at:
            function(*args, **kwargs)
            for path in Path(sys.argv[1]).glob("checkpoints/checkpoint-*/*"):
                if not path.with_name("manifest.json").exists():
                    os.truncate(path, path.stat().st_size // 2)  # what was not yet on the disk
                    break
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
trainer = transformers.Trainer
for name in ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state"):
    setattr(trainer, name, counted(name, getattr(trainer, name)))
checkpoints.figures_of = counted("figures", checkpoints.figures_of)
checkpoints.seal = counted("seal", checkpoints.seal)
here.train(Path(sys.argv[1]), **here.FEATURES)
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 6, 9])
def test_killed_while_saving_it_goes_on(whole: Path, tmp_path: Path, at: int) -> None:
    """kill -9 in each part of saving: the optimiser of the first checkpoint, the model of the second, its figures."""
    here = Path(__file__)
    script = KILLED.format(paths=[str(here.parents[2] / "src"), str(here.parents[1]), str(here.parent)])
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run"), str(at)],
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    assert not (tmp_path / "run" / "model").exists()
    if at < 6:
        with pytest.warns(QwenScopeWarning, match="begins at its first step"):
            train(tmp_path / "run", **FEATURES, resume=True)
    else:
        train(tmp_path / "run", **FEATURES, resume=True)
    same_as(whole, tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
        check_whole(folder)


def test_a_second_writer_is_refused_and_the_first_unharmed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with lock_folder(out):
        before = sorted(path.name for path in out.iterdir())
        with pytest.raises(InputError, match=r"another process .*is writing to"):
            train(out, **FEATURES)
        assert sorted(path.name for path in out.iterdir()) == before
        words = ["posttrain", "sft", "lab", "--sample", "20", "-o", str(out), "--method", "plain"]
        assert main(words) == 2


def test_a_run_that_fails_leaves_no_lock_and_one_that_is_refused_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        run_sft(told(tmp_path / "run", **FEATURES | {"lr": 1e30}), small.ROWS, table=small.table())
    assert not (tmp_path / "run" / ".lock").exists()
    with pytest.raises(InputError, match="needs an alpha table"):
        run_sft(told(tmp_path / "no", method="features"), small.ROWS)
    assert not (tmp_path / "no").exists()


def test_torn_journals_are_mended(whole: Path, tmp_path: Path) -> None:
    out = copy_of(whole, tmp_path / "run")
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    for name in ("log.jsonl", "monitor.jsonl"):
        with (out / name).open("a", encoding="utf-8") as file:
            file.write('{"step": 6, "lo')
    with pytest.warns(QwenScopeWarning, match="torn"):
        train(out, **FEATURES, resume=True)
    same_as(whole, out)


@pytest.mark.slow
def test_a_monitor_holds_its_folder_while_a_model_is_trained(tmp_path: Path) -> None:
    from test_monitor import make, run

    with lock_folder(tmp_path / "watch"), pytest.raises(InputError, match="is writing to"):
        run(tmp_path, make(tmp_path, every=1), max_steps=1)
    monitor = make(tmp_path, every=1)
    run(tmp_path, monitor, max_steps=1)
    assert [line["step"] for line in read_monitor(monitor.path)] == [0, 1]
    assert not (tmp_path / "watch" / ".lock").exists()


@pytest.mark.parametrize("line", ['{"step": true}', "[]", '{"step": 1, "layers": {}}', "no json", '{"layers": []}'])
def test_a_line_that_is_no_measurement(tmp_path: Path, line: str) -> None:
    (tmp_path / "monitor.jsonl").write_text(f"{line}\n")
    with pytest.raises(FormatError, match="line 1 of"):
        read_monitor(tmp_path / "monitor.jsonl")


def test_the_time_is_that_of_the_whole_run(whole: Path) -> None:
    """The clock of the figures goes on as well."""
    seconds = [
        json.loads((whole / "checkpoints" / f"checkpoint-{step}" / "figures.rank0.json").read_text())["seconds"]
        for step in (4, 6)
    ]
    assert 0 < seconds[0] < seconds[1]

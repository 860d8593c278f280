"""A run that was killed goes on to what an unbroken run leaves; damaged checkpoints are passed over; one writer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_scope.cli import main
from qwen_scope.errors import FormatError, InputError, QwenScopeWarning, check_name
from qwen_scope.files import lock_folder
from qwen_scope.train import Checkpoints, JsonlMetrics, TrainConfig, TrainRun, run_train, train
from qwen_scope.train.checkpoint import load, newest
from qwen_scope.train.metrics import read_metrics
from qwen_scope.train.parallel import Ranks

from .conftest import sentences
from .test_checkpoint import CONFIG, Stop, stop_after, table

CLOCKS = ("seconds", "tokens_per_s")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": s}) + "\n" for s in sentences(600)))
    return path


def told(text: Path, model: Path, out: Path, **more) -> TrainRun:
    config = TrainConfig(d_sae=64, k=4, tokens=20 * 128, batch=128, lr=3e-3)
    return TrainRun(
        model=str(model), data=str(text), out=out, train=config, layers=(0, 2), context_length=16, batch_size=8,
        budget=2**19, checkpoint_every=4, eval_tokens=256, hold_out=10, log_every=3, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(text: Path, model_folder: Path, tmp_path_factory) -> Path:
    run = told(text, model_folder, tmp_path_factory.mktemp("run") / "whole")
    run_train(run)
    return run.out


def lines(path: Path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text().split("\n") if line]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in found]


def same_as(whole: Path, part: Path) -> None:
    assert lines(part / "metrics.jsonl") == lines(whole / "metrics.jsonl")
    assert (part / "quality.json").read_text() == (whole / "quality.json").read_text()
    group = next(path.name for path in whole.iterdir() if path.name.startswith("SAE-Res"))
    for path in (whole / group).glob("*.safetensors"):
        assert (part / group / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("broken", [5, 9, 11, 12, 13, 19, 20])
def test_no_line_of_the_metrics_is_missing_or_twice(
    whole: Path, text: Path, model_folder: Path, tmp_path: Path, broken: int
) -> None:
    """Wherever it was broken off: before, at and after a checkpoint, and a line."""
    run = told(text, model_folder, tmp_path / "run")

    def stop(report) -> None:
        if report.step == broken:
            raise Stop

    with pytest.raises(Stop):
        run_train(run, on_step=stop)
    assert not (run.out / ".lock").exists()
    run_train(replace(run, resume=True))
    same_as(whole, run.out)


@pytest.mark.slow
def test_rows_that_can_not_be_used_stand_in_the_record(text: Path, model_folder: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt.jsonl"
    spoilt.write_text("".join(f"{line}\n{{}}\n" for line in text.read_text().splitlines()))
    run = replace(told(spoilt, model_folder, tmp_path / "run"), eval_tokens=0)
    with pytest.warns(QwenScopeWarning, match=r"\d+ of \d+ rows of .*spoilt\.jsonl can't be used and are passed over"):
        run_train(run)
    assert json.loads((run.out / "run.json").read_text())["rows_passed_over"] > 100
    spoilt.write_text("{}\n" * 50)
    with pytest.raises(InputError, match=r"no row of spoilt\.jsonl can be used: .*missing column"):
        run_train(replace(run, out=tmp_path / "none"))


@pytest.mark.slow
def test_the_seconds_go_on(text: Path, model_folder: Path, tmp_path: Path) -> None:
    run = told(text, model_folder, tmp_path / "run")
    with pytest.raises(Stop):
        run_train(run, on_step=stop_after(14))
    run_train(replace(run, resume=True))
    seconds = [entry["seconds"] for entry in read_metrics([run.out / "metrics.jsonl"])]
    assert seconds == sorted(seconds)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from train.test_going_on import run_train, told
from qwen_scope.train import checkpoint

at, count = int(sys.argv[4]), [0]
def counted(function):
    def call(*args, **kwargs):
        count[0] += 1
        if count[0] == at:
            if "save_file" in repr(function):
                function(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
for name in ("save_file", "write_text", "rng_now"):
    setattr(checkpoint, name, counted(getattr(checkpoint, name)))
run_train(told(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 4, 6, 8])
def test_killed_while_saving_it_goes_on(whole: Path, text: Path, model_folder: Path, tmp_path: Path, at: int) -> None:
    """kill -9 with half a file of tensors, before and after the manifest, and between journal and checkpoint."""
    here = Path(__file__)
    script = KILLED.format(paths=[str(here.parents[2] / "src"), str(here.parents[1])])
    words = [text, model_folder, tmp_path / "run", at]
    process = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    run_train(replace(told(text, model_folder, tmp_path / "run"), resume=True))
    assert [one["step"] for one in lines(tmp_path / "run" / "metrics.jsonl")] == [3, 6, 9, 12, 15, 18, 20]
    assert json.loads((tmp_path / "run" / "quality.json").read_text()).keys() == {
        "layers.0.resid_post", "layers.2.resid_post",
    }  # fmt: skip


@pytest.mark.parametrize("harm", ["gone", "torn", "one byte", "no tensors"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, harm: str) -> None:
    whole = train(CONFIG, table(), checkpoints=Checkpoints(tmp_path, every=4))
    path = tmp_path / "step-00000010" / "rank0.safetensors"
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        path.write_bytes({"torn": data[:-40], "one byte": flipped, "no tensors": b""}[harm])
    with pytest.warns(QwenScopeWarning, match="step-00000010 is passed over: .*rank0.safetensors"):
        state = load(CONFIG, Checkpoints(tmp_path), Ranks())
    assert state.step == 8
    assert not path.parent.exists()
    resumed = train(CONFIG, table(), checkpoints=Checkpoints(tmp_path, every=4, resume=True))
    for name, sae in whole.items():
        assert sae.W_enc.equal(resumed[name].W_enc)


@pytest.mark.parametrize(
    "change",
    [
        {"step": True}, {"step": -1}, {"step": 5.0}, {"world": 2}, {"world": False}, {"ranks": []}, {"ranks": [3]},
        {"config": None}, {"seconds": "long"}, {"ranks": [{"layers": {}, "cursor": 3, "bytes": 1, "sha256": ""}]},
    ],
)  # fmt: skip
def test_a_manifest_with_a_value_that_can_not_be(tmp_path: Path, change: dict) -> None:
    train(CONFIG, table(), checkpoints=Checkpoints(tmp_path))
    path = tmp_path / "step-00000010" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=r"manifest\.json"):
        newest(Checkpoints(tmp_path))


def test_a_manifest_of_before_the_seconds_is_read(tmp_path: Path) -> None:
    train(CONFIG, table(), checkpoints=Checkpoints(tmp_path))
    path = tmp_path / "step-00000010" / "manifest.json"
    old = json.loads(path.read_text())
    del old["seconds"]
    path.write_text(json.dumps(old))
    assert load(CONFIG, Checkpoints(tmp_path), Ranks()).seconds == 0


def test_a_torn_line_is_said_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3, "layers": {"a": {"fvu": 1}}}\n{"step": 6, "lay')
    with pytest.warns(QwenScopeWarning, match="torn"):
        assert [entry["step"] for entry in read_metrics([path])] == [3]
    for line in ("{}", '{"step": true, "layers": {}}', '{"step": 3, "layers": []}', "x"):
        path.write_text(f"{line}\n")
        with pytest.raises(FormatError, match="line 1 of"):
            read_metrics([path])


def test_a_fresh_run_begins_its_metrics_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        train(CONFIG, table(), journals=[JsonlMetrics(path, 5)])
        assert [entry["step"] for entry in lines(path)] == [5, 10]


def test_a_second_writer_is_refused_and_the_first_unharmed(text: Path, model_folder: Path, tmp_path: Path) -> None:
    run = told(text, model_folder, tmp_path / "run")
    with lock_folder(run.out), pytest.raises(InputError, match="is writing to"):
        run_train(run)
    assert not (run.out / "checkpoints").exists()
    assert not (run.out / "run.json").exists()


NAMES = [
    "../../x",
    "a/b",
    "/tmp/x",
    "..",
    ".",
    "",
    " ",
    "a\\b",
    "C:x",
    ".hidden",
    "x\n",
    "a\x1b[2J",
    "a\u202eb",
    "é" * 101,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_group_that_is_no_plain_name(text: Path, model_folder: Path, tmp_path: Path, name: str, capsys) -> None:
    with pytest.raises(InputError, match="the group names one file or folder"):
        check_name("the group", name)
    if name:  # without one the run makes its own
        with pytest.raises(InputError, match="the group names one file or folder"):
            told(text, model_folder, tmp_path / "run", group=name)
    words = ["train", str(text), "-o", str(tmp_path / "run"), "--d-sae", "64", "--k", "4", "--tokens", "5000"]
    if name:
        assert main([*words, "--group", name]) == 2
        assert "names one file or folder" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "sae_lens", "tensorboard"])
def test_a_group_that_the_run_needs_for_itself(text: Path, model_folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="the run itself writes to"):
        told(text, model_folder, tmp_path / "run", group=name, exports=("sae_lens",))


@pytest.mark.parametrize("name", ["SAE-Res-Tiny-W1K-L0_8", "my group", "größe", "名前", "a..b", "x.y"])
def test_plain_names_are_taken(name: str) -> None:
    assert check_name("the group", name) == name


def test_a_journal_holds_a_step_before_it_is_saved(tmp_path: Path) -> None:
    """A run that is killed right after a checkpoint has lost no line."""
    seen: list[tuple[int, int]] = []

    def journal(report) -> None:
        last = Checkpoints(tmp_path).latest()
        seen.append((report.step, 0 if last is None else int(last.name[5:])))

    train(CONFIG, table(), checkpoints=Checkpoints(tmp_path, every=2), journals=[journal])
    assert all(saved < step for step, saved in seen)


def test_what_is_passed_over_stays_where_nothing_else_is_whole(tmp_path: Path) -> None:
    train(CONFIG, table(), checkpoints=Checkpoints(tmp_path, every=4))
    for path in tmp_path.glob("step-*/rank0.safetensors"):
        path.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QwenScopeWarning)
        with pytest.raises(FormatError, match=r"step-00000010.*not the file that its manifest describes"):
            load(CONFIG, Checkpoints(tmp_path), Ranks())
    assert len(list(tmp_path.glob("step-*"))) == 2
    shutil.rmtree(tmp_path / "step-00000010")


@pytest.mark.parametrize(
    "wrong",
    [
        {"d_sae": True}, {"d_sae": 64.0}, {"k": True}, {"tokens": 1e4}, {"batch": False}, {"seed": True},
        {"warmup": 1.5},
        {"lr": True}, {"decay": True}, {"aux_weight": float("nan")}, {"aux_weight": float("inf")}, {"clip": True},
        {"betas": (0.9,)}, {"betas": (-0.1, 0.9)},
    ],
)  # fmt: skip
def test_a_number_of_a_config_that_can_not_be(wrong: dict) -> None:
    with pytest.raises((InputError, TypeError)) as said:  # TypeError: the tests also check the types
        replace(CONFIG, **wrong)
    if isinstance(said.value, InputError):
        assert next(iter(wrong)) in str(said.value)

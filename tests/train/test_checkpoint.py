"""Stopping and going on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen_scope.errors import FormatError, InputError, MismatchError
from qwen_scope.train import ARCHITECTURES, Checkpoints, DivergedError, ResidualTable, TrainConfig, train

CONFIG = TrainConfig(d_sae=96, k=6, tokens=640, batch=64, lr=3e-3, dead_tokens=128)


def table(nan_at: int | None = None) -> ResidualTable:
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
    if nan_at is not None:
        x[nan_at] = torch.nan
    return ResidualTable({"layers.0.resid_post": x, "layers.1.resid_post": x.flip(1) * 2}, batch=64)


class Stop(Exception):
    pass


def stop_after(step: int):
    def callback(report) -> None:
        if report.step == step:
            raise Stop

    return callback


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("plain", [False, True], ids=["cursor", "advanced"])
def test_ten_steps_equal_five_and_five_bit_for_bit(tmp_path: Path, architecture: str, plain: bool) -> None:
    config = replace(CONFIG, architecture=architecture)

    def source():
        return (b for b in table()) if plain else table()

    whole = train(config, source())
    with pytest.raises(Stop):
        train(config, source(), checkpoints=Checkpoints(tmp_path, every=5), callbacks=[stop_after(6)])
    torch.randn(3)
    steps = []
    resumed = train(
        config,
        source(),
        checkpoints=Checkpoints(tmp_path, every=5, resume=True),
        callbacks=[lambda r: steps.append(r.step)],
    )
    assert steps == [6, 7, 8, 9, 10]
    for name, sae in whole.items():
        for part in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            if hasattr(sae, part):
                assert torch.equal(getattr(sae, part), getattr(resumed[name], part)), part


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Poisoned:
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            for i, batch in enumerate(table()):
                if i == 6:
                    batch["layers.1.resid_post"][3, 2] = torch.nan
                yield batch

    with pytest.raises(DivergedError, match=r"residuals of layers.1.resid_post .* step 7 \(batch 7 .*step-00000006"):
        train(CONFIG, Poisoned(), checkpoints=Checkpoints(tmp_path, every=2))
    resumed = train(CONFIG, table(), checkpoints=Checkpoints(tmp_path, every=2, resume=True))
    whole = train(CONFIG, table())
    assert all(torch.equal(whole[name].W_enc, sae.W_enc) for name, sae in resumed.items())


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    train(CONFIG, table(), checkpoints=Checkpoints(tmp_path))
    with pytest.raises(MismatchError, match="k 6 there and 7 here"):
        train(replace(CONFIG, k=7), table(), checkpoints=Checkpoints(tmp_path, resume=True))
    with pytest.raises(InputError, match="resume it, or name another folder"):
        train(CONFIG, table(), checkpoints=Checkpoints(tmp_path))


def test_a_damaged_file_is_found(tmp_path: Path) -> None:
    train(CONFIG, table(), checkpoints=Checkpoints(tmp_path))
    file = next(tmp_path.glob("step-*/rank0.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(FormatError, match="not the file that its manifest describes"):
        train(CONFIG, table(), checkpoints=Checkpoints(tmp_path, resume=True))


def test_a_manifest_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000005" / "manifest.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(FormatError, match="not a manifest"):
        train(CONFIG, table(), checkpoints=Checkpoints(tmp_path, resume=True))


def test_only_the_latest_stay(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").mkdir()
    train(CONFIG, table(), checkpoints=Checkpoints(tmp_path, every=2, keep=3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000006", "step-00000008", "step-00000010"]


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="can't be written to"):
        train(CONFIG, table(), checkpoints=Checkpoints(file / "inside"))
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="GB free; 3 checkpoints take"):
        train(CONFIG, table(), checkpoints=Checkpoints(tmp_path / "run"))


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_scope.train import checkpoint

    write, calls = checkpoint.save_file, []

    def full(tensors, path) -> None:
        calls.append(path)
        write(tensors, path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=r"step 6 can't be written.*No space left.*step-00000004"):
        train(CONFIG, table(), checkpoints=Checkpoints(tmp_path, every=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


SCRIPT = """
import sys, torch
from pathlib import Path
from qwen_scope.train import Checkpoints, ResidualTable, TrainConfig, train
x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
table = ResidualTable({"layers.0.resid_post": x, "layers.1.resid_post": x.flip(1) * 2}, batch=64)
config = TrainConfig(d_sae=96, k=6, tokens=64 * 20000, batch=64, lr=3e-3, dead_tokens=128, warmup=5, decay=0.0)
print("go", flush=True)
train(config, table, checkpoints=Checkpoints(Path(sys.argv[1]), every=1, resume=True))
"""


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_checkpoint_that_goes_on(tmp_path: Path) -> None:
    from qwen_scope.train.checkpoint import load
    from qwen_scope.train.parallel import Ranks

    config = TrainConfig(d_sae=96, k=6, tokens=64 * 20000, batch=64, lr=3e-3, dead_tokens=128, warmup=5, decay=0.0)
    reached = 0
    for delay in (0.31, 0.123, 0.257):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        before, deadline = reached, time.monotonic() + 60
        where = Checkpoints(tmp_path, resume=True)
        while time.monotonic() < deadline and not (where.latest() and int(where.latest().name[5:]) > before + 2):
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        state = load(config, where, Ranks())
        assert state.step > before
        reached = state.step
    # What the killed runs reached is what an undisturbed run reaches, but for the order in which another number of
    # threads adds; a step more or less would be three thousand times as far.

    def keep(report) -> None:
        if report.step == reached:
            raise Stop

    with pytest.raises(Stop):
        train(config, table(), checkpoints=Checkpoints(tmp_path / "other", every=reached), callbacks=[keep])
    undisturbed = load(config, Checkpoints(tmp_path / "other"), Ranks())
    for name, layer in state.layers.items():
        torch.testing.assert_close(layer.weights.W_enc, undisturbed.layers[name].weights.W_enc, atol=1e-6, rtol=1e-5)

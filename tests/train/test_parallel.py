"""Two gloo processes give the weights of one, within the tolerance stated here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from qwen_scope.errors import InputError
from qwen_scope.train import ARCHITECTURES, Ranks, join

# Sums over ranks add fp32 numbers in another order, and Adam passes that on: ten steps leave differences below this.
TOLERANCE = {"rtol": 1e-3, "atol": 2e-4}
STEPS = 10

SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from qwen_scope.text import Counted
from qwen_scope.train import Checkpoints, Ranks, TrainConfig, join, train
from qwen_scope.sae import leave_group as leave
out, world = Path(sys.argv[1]), int(sys.argv[2])
g = torch.Generator().manual_seed(0)
directions = torch.nn.functional.normalize(torch.randn(40, 16, generator=g), dim=1)
which = torch.rand(640, 40, generator=g).topk(4).indices
x = 7 * (torch.einsum("nk,nkd->nd", torch.rand(640, 4, generator=g) + 0.5, directions[which]) + 0.3)
x[100] *= 100
names = ["layers.0.resid_post", "layers.1.resid_post", "layers.3.resid_post"]
usual = float(x.norm(dim=1).median())
counted = Counted(norms={name: 10 * usual * (1 + i) for i, name in enumerate(names)})
for architecture in sys.argv[3].split(","):
    # Dead from the third step on, so that AuxK works in all modes.
    config = TrainConfig(d_sae=64, k=4, tokens=640, batch=64, lr=2e-3, dead_tokens=128, architecture=architecture)
    for mode in ("data", "layers", "features"):
        ranks = join(mode, "gloo") if world > 1 else Ranks()
        share = ranks.share_of(64)
        own = ranks.owned(names)
        def batches():
            for part in x.split(64):
                mine = part[ranks.rank * share :][:share] if ranks.mode == "data" else part
                yield {name: mine * (1 + names.index(name)) for name in own}
        seen = []
        where = out / f"{world}-{architecture}-{mode}"
        half = Checkpoints(where, every=5)
        class Stop(Exception): pass
        def stop(report):
            if report.step == 5: raise Stop
        try:
            train(config, batches(), checkpoints=half, callbacks=[stop], ranks=ranks, counted=counted)
        except Stop:
            pass
        again = replace(half, resume=True)
        saes = train(config, batches(), checkpoints=again, callbacks=[seen.append], ranks=ranks, counted=counted)
        assert ranks.of_first(torch.tensor([ranks.rank + 5.0])).tolist() == [5.0]
        parts = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        torch.save(
            {
                "weights": {n: {p: getattr(s, p) for p in parts if hasattr(s, p)} for n, s in saes.items()},
                "reports": {n: (r.fvu, r.l0, r.dead, r.dropped) for n, r in seen[-1].layers.items()},
            },
            out / f"{world}-{architecture}-{mode}-{ranks.rank}.pt",
        )
if world > 1:
    def gloo():
        return [f for f in Path("/proc/self/task").glob("*/comm") if "gloo" in f.read_text()]
    assert gloo()
    leave()
    assert not gloo(), "threads that are left abort a process at its end, now and then"
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All architectures in all modes, by two processes and by one."""
    out = tmp_path_factory.mktemp("ranks")
    port, kinds = free_port(), ",".join(sorted(ARCHITECTURES))
    running = []
    for world, rank in ((1, 0), (2, 0), (2, 1)):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(out), str(world), kinds]
        running.append(subprocess.Popen(command, env={**os.environ, **place}, stderr=subprocess.PIPE, text=True))
    errors = []
    for process in running:
        _, err = process.communicate(timeout=280)
        errors.append(err if process.returncode else "")
    assert not any(errors), "\n".join(errors)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("mode", ["data", "layers", "features"])
def test_two_processes_give_the_weights_of_one(results: Path, architecture: str, mode: str) -> None:
    def read(world: int, rank: int) -> dict:
        return torch.load(results / f"{world}-{architecture}-{mode}-{rank}.pt", weights_only=True)

    one, ranks = read(1, 0), [read(2, 0), read(2, 1)]
    seen = [name for rank in ranks for name in rank["weights"]]
    assert sorted(set(seen)) == sorted(one["weights"])
    assert len(seen) == (3 if mode == "layers" else 6)
    for rank in ranks:
        for name, weights in rank["weights"].items():
            for part, tensor in weights.items():
                torch.testing.assert_close(tensor, one["weights"][name][part], **TOLERANCE, msg=f"{name} {part}")
            assert rank["reports"][name] == pytest.approx(one["reports"][name], rel=1e-3)
    assert all(report[3] == 1 for report in one["reports"].values()), "the sink was dropped once per layer"


def test_what_can_not_be_spread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="data, layers or features"):
        Ranks("alone", 0, 2)
    with pytest.raises(InputError, match="equal slices"):
        Ranks("features", 0, 2).slice_of(65)
    with pytest.raises(InputError, match="equal shares"):
        Ranks("data", 0, 2).share_of(65)
    with pytest.raises(InputError, match="start fewer"):
        Ranks("layers", 0, 2).owned(["layers.0"])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="torchrun"):
        join("data")

"""Apple's MPS by construction: what people do there, on a device that refuses what MPS lacks (`like_mps`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
REFUSED = {
    "float64 of a residual": "h.double()",
    "float64 made there": "torch.zeros(2, dtype=torch.float64, device=h.device)",
    "float64 moved there": "torch.ones(2, dtype=torch.float64).to(h.device)",
    "float64 on the way to the CPU": "h.to('cpu', torch.float64)",
    "float64 inside a sum": "h.sum(dtype=torch.float64)",
    "complex128": "torch.fft.fft(h.cpu().double()).to(h.device)",
    "a sampled product": "torch.sparse.sampled_addmm(torch.eye(4).to_sparse_csr().to(h.device), h, h)",
    "eigenvalues": "torch.linalg.eigh(h)",
    "frexp": "torch.frexp(h)",
    "two devices": "h + torch.ones(4, 4)",
    "an array": "h.numpy()",
}
ALLOWED = {
    "float64 on the CPU": "h.cpu().double().sum().item()",
    "float32 there": "h.float().softmax(-1).topk(2).values.tolist()",
    "a number of the CPU": "(h * torch.tensor(2.0)).sum().item()",
    "indices of the CPU": "h[torch.tensor([0, 1])].shape",
}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([".", *sys.path]), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_everything_runs_there_and_gives_the_figures_of_the_cpu(tmp_path: Path) -> None:
    done = run("scope/mps_path.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert set(found["cpu"]) == set(found["mps"])
    for step, expected in found["cpu"].items():
        exact = step.startswith(("steer", "strongest", "compare"))
        assert found["mps"][step] == (expected if exact else pytest.approx(expected, rel=1e-3)), step
    done_there = set(found["operations"])
    assert {"aten::mm", "aten::topk", "aten::_fused_adam_", "aten::_embedding_bag"} <= done_there


@pytest.mark.slow
def test_the_device_refuses_what_mps_lacks_and_nothing_else() -> None:
    """The control: each of these in the path would have been found."""
    code = f"""
import json, torch, like_mps
like_mps.install()
h = torch.arange(16.0).view(4, 4).to(like_mps.NAME)
def said(source):
    try:
        eval(source)
    except like_mps.RefusedOnMPSError as error:
        return str(error)
refused, allowed = json.loads({json.dumps(json.dumps(REFUSED))}), json.loads({json.dumps(json.dumps(ALLOWED))})
print(json.dumps({{name: said(source) for name, source in (refused | allowed).items()}}))
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [name for name in REFUSED if found[name] is None] == []
    assert {name: found[name] for name in ALLOWED} == dict.fromkeys(ALLOWED)

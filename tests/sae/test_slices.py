"""Two gloo processes that each hold half of a dictionary give the features of one process, ties included."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import sae_toys
import torch

from qwen_scope.errors import InputError
from qwen_scope.sae import slice_sae

SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from qwen_scope.errors import InputError
from qwen_scope.sae import JumpReLU, TopK, join_group, leave_group, slice_sae
from qwen_scope.scope import load_scope
out, world = sys.argv[1], int(sys.argv[2])
group = join_group("gloo") if world > 1 else None
g = torch.Generator().manual_seed(0)
def whole(width, d_model):
    # Features come in equal pairs, one of each in either half, and in equal neighbours: ties in and between slices.
    W = torch.randn(width // 2, d_model, generator=g)
    W[1::2] = W[::2]
    W_enc, b_enc = torch.cat([W, W]), torch.randn(width // 4, generator=g).repeat_interleave(2).repeat(2)
    W_dec, b_dec = torch.randn(d_model, width, generator=g), torch.randn(d_model, generator=g)
    return W_enc, W_dec, b_enc, b_dec
found = []
for width, d_model, k, rows in ((64, 16, 6, (40,)), (64, 16, 40, (3, 5)), (4096, 256, 50, (64,)), (64, 16, 64, (1,))):
    x = torch.randn(*rows, d_model, generator=g)
    weights = whole(width, d_model)
    for sae in (TopK(*weights, k=k), JumpReLU(*weights, threshold=torch.full((width,), 1.5))):
        mine = sae if group is None else slice_sae(sae, *group)
        assert (mine.d_sae, mine.d_model, mine.k, mine.architecture) == (width, d_model, sae.k, sae.architecture)
        acts = mine.encode(x)
        some = mine.pre_acts(x, [width - 1, 0, 5])
        found.append((acts.indices, acts.values, mine.decode(acts), mine.pre_acts(x), some))
    bad = torch.full((2, d_model), float("nan"))
    try:
        mine.encode(bad)
    except InputError as error:
        assert "not finite" in str(error)
    else:
        raise AssertionError
    weights[0][1] = float("inf")  # of one slice alone
    broken = TopK(*weights, k=k)
    broken = broken if group is None else slice_sae(broken, *group)
    try:
        broken.encode(x)
    except InputError as error:
        assert "not finite" in str(error), "of whichever process it is, all say it"
    else:
        raise AssertionError
scope = load_scope(sys.argv[3] + "/model", sys.argv[3] + "/sae", device="cpu", sliced=group is not None)
seen = scope.features(["hello friend, hello", "a longer text"], [0, 2])
found += [(seen.acts[layer].indices, seen.acts[layer].values) for layer in (0, 2)]
torch.save(found, f"{out}/{world}-{group[0] if group else 0}.pt")
leave_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_features_of_one(tmp_path: Path) -> None:
    import tiny

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
    running = []
    for world, rank in ((1, 0), (2, 0), (2, 1)):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(world)}
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path), str(world), str(tiny.folder())]
        running.append(subprocess.Popen(command, env={**os.environ, **place}, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=280)[1] if process else "" for process in running]
    assert not any(process.returncode for process in running), "\n".join(errors)
    one = torch.load(tmp_path / "1-0.pt", weights_only=True)
    for rank in range(2):
        for mine, expected in zip(torch.load(tmp_path / f"2-{rank}.pt", weights_only=True), one, strict=True):
            assert torch.equal(mine[0], expected[0]), "the same features in the same slots"
            torch.testing.assert_close(mine[1], expected[1], rtol=1e-6, atol=1e-6)
            for a, b in zip(mine[2:], expected[2:], strict=True):
                # Sums of `decode` are added up in another order.
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    values = one[0][1]
    assert (values[:, :-1] == values[:, 1:]).any(-1).all(), "every row has ties"


def test_what_can_t_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_scope.sae import join_group

    sae = sae_toys.toy()
    with pytest.raises(InputError, match="can't be cut into slice 0 of 1000"):
        slice_sae(sae, 0, 1000)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="a group needs processes that torchrun starts: torchrun"):
        join_group()

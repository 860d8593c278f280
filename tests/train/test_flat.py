"""The flat loop runs, stays flat, and agrees with the real one's step."""

from __future__ import annotations

from pathlib import Path

import torch

from qwen_scope.train import Ranks, TrainConfig
from qwen_scope.train.step import start, step

ROOT = Path(__file__).parents[2]


def test_the_two_loops_name_each_other() -> None:
    flat = (ROOT / "examples" / "train_flat.py").read_text()
    assert len(flat.splitlines()) <= 60
    assert "src/qwen_scope/train/loop.py" in flat
    assert "examples/train_flat.py" in (ROOT / "src/qwen_scope/train/loop.py").read_text()


def test_a_step_is_the_dense_formula_with_torchs_adam() -> None:
    """Five steps of the package against dense autograd restated here, with AuxK from the third step on."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, 12, generator=g) * 3 + 1
    config = TrainConfig(d_sae=96, k=4, tokens=320, batch=64, lr=1e-3, dead_tokens=128)
    layer = start(config, "layers.0", x[0], Ranks())
    w = layer.weights
    W_enc, W_dec, b_enc, b_dec = (t.detach().clone().requires_grad_() for t in (w.W_enc, w.W_dec, w.b_enc, w.b_dec))
    parameters = [W_enc, W_dec, b_enc, b_dec]
    adam = torch.optim.Adam(parameters, betas=(0.5, 0.95), eps=config.eps)
    silent, met_the_dead = torch.zeros(96), False
    for i, raw in enumerate(x):
        batch = raw * w.scale
        pre = ((batch - b_dec) @ W_enc.T + b_enc).relu()
        acts = pre * torch.zeros_like(pre).scatter(1, pre.topk(4).indices, 1.0)
        x_hat = acts @ W_dec + b_dec
        variance = ((batch - batch.mean(0)) ** 2).sum()
        loss = fvu = ((batch - x_hat) ** 2).sum() / variance
        dead = silent >= 128
        if dead.any():
            met_the_dead = True
            spare = ((batch - b_dec.detach()) @ W_enc.T + b_enc).relu() * dead
            spare = spare * torch.zeros_like(pre).scatter(1, spare.topk(6).indices, 1.0)
            loss = fvu + (((batch - x_hat).detach() - spare @ W_dec) ** 2).sum() / variance / 32
        report = step(config, layer, raw, lr := config.lr_at(i), Ranks())
        assert abs(report.loss - float(loss.detach())) < 1e-5
        assert abs(report.fvu - float(fvu.detach())) < 1e-5
        adam.param_groups[0]["lr"] = lr
        adam.zero_grad()
        loss.backward()
        W_dec.grad -= (W_dec.grad * W_dec.detach()).sum(1, keepdim=True) * W_dec.detach()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        adam.step()
        W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)
        silent = torch.where((acts > 0).any(0), 0, silent + 64)
    assert met_the_dead
    for ours, theirs in zip((w.W_enc, w.W_dec, w.b_enc, w.b_dec), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

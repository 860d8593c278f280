"""AuxK, FVU, the decoder's sphere and the sink filter, each against its formula restated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwen_scope.errors import NotFoundError
from qwen_scope.text import Counted
from qwen_scope.train import Ranks, TrainConfig, train
from qwen_scope.train.initial import trainable
from qwen_scope.train.losses import aux_k, fvu, total_variance
from qwen_scope.train.step import DivergedError, start, step, without_sinks
from qwen_scope.train.weights import Weights

D_MODEL, D_SAE, N = 5, 12, 9
DEAD = [2, 5, 6, 11]


def setting(pre_bias: bool) -> tuple[Weights, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weights = trainable(
        draw(D_SAE, D_MODEL), draw(D_SAE, D_MODEL), draw(D_SAE), draw(D_MODEL),
        scale=1.0, pre_bias=pre_bias, norms=torch.ones(D_SAE, dtype=torch.float64),
    )  # fmt: skip
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[DEAD] = True
    return weights, draw(N, D_MODEL), draw(N, D_MODEL), dead


def aux_by_formula(weights: Weights, x: torch.Tensor, error: torch.Tensor, k_aux: int) -> torch.Tensor:
    """Gao et al. A.2, dense: the k_aux largest ReLU pre-activations of dead features reconstruct the error."""
    seen = x - weights.b_dec if weights.pre_bias else x
    pre = torch.relu(seen @ weights.W_enc.T + weights.b_enc)
    living = torch.tensor([i for i in range(D_SAE) if i not in DEAD])
    pre = pre.index_fill(1, living, 0.0)
    keep = torch.zeros_like(pre).scatter_(1, pre.topk(k_aux).indices, 1.0)
    e_hat = (pre * keep) @ weights.W_dec
    return ((error - e_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("k_aux", [2, 8])
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_aux_k_reaches_dead_features_by_finite_differences_and_nothing_else(
    pre_bias: bool, k_aux: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_scope.train.losses.DENSE_MOST", 2 if path == "dense" else 0)
    weights, x, error, dead = setting(pre_bias)
    error.requires_grad_()
    loss = aux_k(weights, x, error, dead, k_aux, total_variance(x))
    torch.testing.assert_close(loss, aux_by_formula(weights, x, error, k_aux))
    loss.backward()
    assert weights.b_dec.grad is None
    assert error.grad is None
    eps = 1e-6
    for name in ("W_enc", "W_dec", "b_enc"):
        tensor = getattr(weights, name)
        assert tensor.grad is not None
        with torch.no_grad():
            flat = tensor.view(-1)
            for i in range(len(flat)):
                was = float(flat[i])
                flat[i] = was + eps
                up = float(aux_by_formula(weights, x, error, k_aux))
                flat[i] = was - eps
                down = float(aux_by_formula(weights, x, error, k_aux))
                flat[i] = was
                assert float(tensor.grad.view(-1)[i]) == pytest.approx((up - down) / (2 * eps), abs=1e-8)
        rows = tensor.grad.reshape(D_SAE, -1).abs().sum(1)
        assert not rows[~dead].any(), f"AuxK reaches living features through {name}"
        assert rows[dead].any(), f"AuxK does not reach {name} of dead features"


def test_aux_k_without_variance_is_zero() -> None:
    weights, x, error, dead = setting(True)
    same = x[:1].expand(N, -1)
    assert aux_k(weights, same, error * torch.nan, dead, 2, total_variance(same)) == 0


def test_fvu_is_one_for_the_mean_and_zero_for_the_residual_itself() -> None:
    _, x, _, _ = setting(True)
    assert fvu(x, x.mean(0).expand_as(x), total_variance(x)) == pytest.approx(1.0)
    assert fvu(x, x, total_variance(x)) == 0


FIRST = "layers.0.resid_post"
CONFIG = TrainConfig(d_sae=40, k=4, tokens=320, batch=32, lr=1e-2)


def test_decoder_columns_stay_on_the_unit_sphere() -> None:
    x = torch.randn(320, 8, generator=torch.Generator().manual_seed(0)) * 5 + 2
    saes = train(CONFIG, ({"layers.0.resid_post": part} for part in x.split(32)))
    norms = saes["layers.0.resid_post"].W_dec.norm(dim=0)
    torch.testing.assert_close(norms, torch.ones(40), rtol=0, atol=1e-6)


def test_the_gradient_along_a_direction_is_removed() -> None:
    weights, *_ = setting(True)
    weights.normalise()
    weights.W_dec.grad = torch.randn(D_SAE, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights.drop_parallel_gradient()
    along = (weights.W_dec.grad * weights.W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros(D_SAE, dtype=torch.float64), rtol=0, atol=1e-12)


def test_sinks_are_dropped_at_any_position_and_counted() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=g)
    x[5] *= 200
    x[40] *= 50
    counted = Counted(
        norms={FIRST: 10 * float(x.norm(dim=1).median()), "layers.1.resid_post": 1e-3, "layers.2.resid_post": None}
    )
    layer = start(replace(CONFIG, batch=64), "layers.0.resid_post", x, Ranks(), counted=counted)
    kept = without_sinks(counted, layer.name, x)
    assert torch.equal(kept, torch.cat([x[:5], x[6:40], x[41:]]))
    report = step(CONFIG, layer, x, 1e-3, Ranks(), counted)
    assert (report.dropped, layer.tokens) == (2, 62)
    for all_kept in (Counted(), Counted.everything(), Counted(norms={FIRST: None})):
        assert len(without_sinks(all_kept, layer.name, x)) == 64
    assert len(without_sinks(counted, "layers.1.resid_post", x)) == 0
    assert len(without_sinks(counted, "layers.2", x)) == 64
    with pytest.raises(NotFoundError, match=r"no threshold for sinks was measured at layers\.3"):
        without_sinks(counted, "layers.3.resid_post", x)


def test_what_is_not_finite_is_no_sink_to_a_run() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    counted = Counted(norms={FIRST: 10 * float(x.norm(dim=1).median())})
    layer = start(CONFIG, "layers.0.resid_post", x, Ranks(), counted=counted)
    for bad in (float("nan"), float("inf"), -float("inf")):
        poisoned = x.clone()
        poisoned[7, 3] = bad
        with pytest.raises(DivergedError, match=r"residuals of layers\.0\.resid_post hold NaN or infinity"):
            step(CONFIG, layer, poisoned, 1e-3, Ranks(), counted)

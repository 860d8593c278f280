"""What every architecture must do; each is found in the registry, so a new one is tested by existing."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.sae import LAYOUTS, fingerprint, load_sae, save_sae
from qwen_scope.train import ARCHITECTURES, JumpReLUTraining, Ranks, ResidualTable, TrainConfig, train
from qwen_scope.train import architecture as train_architecture
from qwen_scope.train.losses import pre_acts_of, total_variance
from qwen_scope.train.step import Batch, start

NAME = "layers.2.resid_post"
EVERY = pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))


def planted(n: int = 6000, d_model: int = 24, features: int = 48, active: int = 4) -> torch.Tensor:
    """Sums of a few of 48 fixed directions, off the origin, with a little noise."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(features, d_model, generator=g), dim=1)
    which = torch.rand(n, features, generator=g).topk(active).indices
    amounts = torch.rand(n, active, generator=g) + 0.5
    x = torch.einsum("nk,nkd->nd", amounts, directions[which])
    return 7 * (x + 0.02 * torch.randn(n, d_model, generator=g) + 0.5)


def config_for(architecture: str, **changes: object) -> TrainConfig:
    base = TrainConfig(d_sae=96, k=6, tokens=128_000, batch=512, lr=1e-2, architecture=architecture)
    return replace(base, **changes)


def fvu_of(sae, x: torch.Tensor) -> float:
    error = (x.double() - sae.decode(sae.encode(x)).double()).square().sum()
    return float(error / (x.double() - x.double().mean(0)).square().sum())


@pytest.mark.slow
@EVERY
def test_it_learns_keeps_its_sparsity_and_comes_back_from_disk(architecture: str, tmp_path: Path) -> None:
    x = planted()
    last = []
    saes = train(config_for(architecture), ResidualTable({NAME: x}, batch=512), callbacks=[last.append], group="g")
    sae = saes[NAME]
    assert sae.hook_point == NAME
    assert (sae.identity.group, sae.identity.layer) == ("g", 2)
    assert fvu_of(sae, x) < 0.25
    assert 3 < float(sae.encode(x).active().double().mean()) < 9
    # What training saw is what the exported SAE does on raw residuals.
    assert fvu_of(sae, x) == pytest.approx(last[-1].layers[NAME].fvu, abs=0.02)
    save_sae(sae, tmp_path / "g")
    again = load_sae(tmp_path / "g", 2)
    # The name of the SAE is that of the weights that were saved, a threshold included, and stays so when converted.
    own = {n: getattr(again, n) for n in ("W_enc", "W_dec", "b_enc", "b_dec")}
    own |= again.own_tensors()
    assert again.identity == sae.identity
    assert sae.identity.fingerprint == fingerprint(**own)
    other = "sae_lens" if again.architecture in (LAYOUTS["sae_lens"].kinds or ()) else "safetensors"
    save_sae(again, tmp_path / "other", other, torch.bfloat16)
    assert load_sae(tmp_path / "other", 2).identity == sae.identity
    assert again.architecture == ARCHITECTURES[architecture].saved_as
    assert torch.equal(again.encode(x[:100]).to_dense(), sae.encode(x[:100]).to_dense())


@EVERY
def test_a_trained_sae_has_the_fingerprint_of_what_is_saved(architecture: str, tmp_path: Path) -> None:
    x = planted(1024)
    sae = train(config_for(architecture, tokens=512 * 2), ResidualTable({NAME: x}, batch=512), group="g")[NAME]
    for layout, entry in LAYOUTS.items():
        if entry.kinds is not None and sae.architecture not in entry.kinds:
            continue
        save_sae(sae, tmp_path / layout, layout)
        again = load_sae(tmp_path / layout, 2)
        # Written out: the digest is of what lies in the files, a threshold included.
        whole = {name: getattr(again, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", *again.own)}
        assert again.identity.fingerprint == sae.identity.fingerprint, layout
        if layout in ("official", "safetensors"):
            assert fingerprint(**whole) == sae.identity.fingerprint
        assert again.nbytes == sum(4 * tensor.numel() for tensor in whole.values())


@EVERY
@pytest.mark.parametrize("pre_bias", [True, False])
def test_the_exported_sae_computes_what_training_computed(architecture: str, pre_bias: bool) -> None:
    """One batch through the training forward pass and through the exported SAE, before any step."""
    x = planted(256)
    config = config_for(architecture, pre_bias=pre_bias, batch=256)
    layer, kind, shape, ranks = start(config, NAME, x, Ranks()), config.kind, config.shape, Ranks()
    w = layer.weights
    with torch.no_grad():
        w.b_enc.add_(torch.linspace(-0.1, 0.1, 96))
    scaled = x * w.scale
    batch = Batch(scaled, 256.0, total_variance(scaled), ranks)
    values, active = kind.choose(shape, w, scaled, ranks)
    outcome = kind.forward(shape, w, batch, pre_acts_of(w, scaled, values, active, ranks), active)
    for _ in range(2000):
        kind.after(shape, w, batch, outcome)
    from qwen_scope.train.loop import finish

    sae = finish(config, layer, "g", ranks, {})
    dense = torch.zeros(256, 96)
    dense[active.row_of.long(), active.features.long()] = outcome.acts.detach() / w.scale
    seen = sae.encode(x).to_dense()
    # A threshold that is an activation itself may fall on either side of it.
    close = (seen - dense).abs() < 1e-4
    assert close.double().mean() > 0.999
    rows = close.all(1)
    torch.testing.assert_close(
        sae.decode(sae.encode(x))[rows], (outcome.x_hat.detach() / w.scale)[rows], rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
@EVERY
def test_training_goes_on_from_a_finished_sae(architecture: str) -> None:
    x = planted()
    first = train(config_for(architecture), ResidualTable({NAME: x}, batch=512))
    more = config_for(architecture, tokens=512 * 10, lr=1e-6, warmup=0)
    second = train(more, ResidualTable({NAME: x}, batch=512), init=first)
    assert fvu_of(second[NAME], x) < 1.1 * fvu_of(first[NAME], x) + 0.01
    assert torch.nn.functional.cosine_similarity(first[NAME].W_dec, second[NAME].W_dec, dim=0).min() > 0.999


def test_fine_tuning_keeps_norms_that_are_not_one() -> None:
    from qwen_scope.sae import TopK

    x = planted()
    sae = train(config_for("topk"), ResidualTable({NAME: x}, batch=512))[NAME]
    norms = torch.linspace(0.5, 2.0, 96)
    rescaled = TopK(sae.W_enc, sae.W_dec * norms, sae.b_enc, sae.b_dec, k=6, hook_point=NAME)
    tuned = train(
        config_for("topk", tokens=512 * 3, lr=1e-9, warmup=0),
        ResidualTable({NAME: x}, batch=512),
        init={NAME: rescaled},
    )[NAME]
    torch.testing.assert_close(tuned.W_dec.norm(dim=0), rescaled.W_dec.norm(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        tuned.decode(tuned.encode(x[:50])), rescaled.decode(rescaled.encode(x[:50])), rtol=1e-3, atol=1e-3
    )


def test_an_sae_that_does_not_fit_is_refused() -> None:
    x = planted(1024)
    sae = train(config_for("topk", tokens=512), ResidualTable({NAME: x}, batch=512))
    with pytest.raises(MismatchError, match="96 features of 24 dimensions; this run trains 128"):
        train(config_for("topk", d_sae=128), ResidualTable({NAME: x}, batch=512), init=sae)
    with pytest.raises(MismatchError, match="topk SAE; jumprelu can continue from a jumprelu one"):
        train(config_for("jumprelu"), ResidualTable({NAME: x}, batch=512), init=sae)
    with pytest.raises(MismatchError, match=r"differ in layers\.2"):
        train(
            config_for("topk"),
            ResidualTable({NAME: x, "layers.0.resid_post": x}, batch=512),
            init={"layers.0.resid_post": sae[NAME]},
        )


def test_batchtopk_is_the_largest_of_the_batch() -> None:
    from qwen_scope.train.selection import best_of_batch

    g = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(37, 6, generator=g), torch.randn(40, 6, generator=g), torch.randn(40, generator=g)
    x[3] *= 30  # one row takes far more than its share
    values, active = best_of_batch(x, W, b, 2, Ranks())
    dense = torch.relu(x @ W.T + b)
    expected = torch.where(dense >= dense.flatten().topk(74).values[-1], dense, 0)
    found = torch.zeros(37, 40)
    found[active.row_of.long(), active.features.long()] = values
    torch.testing.assert_close(found, expected)


def test_jumprelu_gradients_are_the_papers_estimators() -> None:
    from qwen_scope.train.architectures.jumprelu import Jump
    from qwen_scope.train.sparse import Active

    pre = torch.tensor([0.96, 1.04, 2.0], dtype=torch.float64, requires_grad=True)
    theta = torch.ones(3, dtype=torch.float64, requires_grad=True)
    acts, fired = Jump.apply(pre, Active.of_slots(torch.tensor([[0, 1, 2]]), 3), theta, 0.1)
    assert acts.tolist() == [0, 1.04, 2.0]
    (3 * acts.sum() + 5 * fired.sum()).backward()
    assert pre.grad is not None
    assert theta.grad is not None
    assert pre.grad.tolist() == [0, 3, 3]
    # -(theta / eps) K dL/da - (1 / eps) K dL/dL0, inside the band of width eps only
    torch.testing.assert_close(theta.grad, torch.tensor([-80.0, -80.0, 0.0], dtype=torch.float64))


@pytest.mark.slow
def test_matryoshka_prefixes_reconstruct_better_than_topks() -> None:
    x = planted()
    shares = {}
    for architecture in ("batchtopk", "matryoshka"):
        sae = train(config_for(architecture), ResidualTable({NAME: x}, batch=512))[NAME]
        dense = sae.encode(x).to_dense()
        dense[:, 24:] = 0
        part = dense @ sae.W_dec.T + sae.b_dec
        shares[architecture] = float((x - part).square().sum() / (x - x.mean(0)).square().sum())
    assert shares["matryoshka"] < shares["batchtopk"]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"k": 97}, InputError, "only 96 features"),
        ({"k": 0}, InputError, "k must be at least 1"),
        ({"tokens": 100}, InputError, "fewer than one batch"),
        ({"architecture": "topkk"}, NotFoundError, "did you mean 'topk'"),
        ({"lr": -1.0}, InputError, "lr must be a positive number"),
        ({"warmup": 10_000}, InputError, "does not fit a run of"),
        ({"decay": 1.5}, InputError, "share of the run"),
        ({"betas": (0.9, 1.0)}, InputError, "betas are two numbers"),
        ({"aux_weight": -1.0}, InputError, "must not be negative"),
    ],
)
def test_impossible_configs_are_refused_with_the_reason(changes: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        config_for(**{"architecture": "topk", **changes})


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("topk", {"prefixes": (0.5, 1.0)}, InputError, "prefixes has no meaning for topk, only for matryoshka"),
        ("matryoshka", {"prefixes": (0.5, 0.2, 1.0)}, InputError, "rising shares"),
        ("matryoshka", {"prefixes": ()}, InputError, "rising shares"),
        ("topk", {"bandwidth": 0.1}, InputError, "bandwidth has no meaning for topk, only for jumprelu"),
        ("jumprelu", {"bandwidth": 0.0}, InputError, "bandwidth"),
        ("jumprelu", {"l0_weight": float("nan")}, InputError, "l0_weight"),
        ("jumprelu", {"bandwith": 0.1}, InputError, "bandwith has no meaning for jumprelu; leave it out"),
        ("jumprelux", {}, NotFoundError, "did you mean 'jumprelu'"),
    ],
)
def test_an_architecture_refuses_options_that_it_does_not_have(
    name: str, options: dict, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        replace(config_for("topk"), architecture=train_architecture(name, **options))


@EVERY
def test_an_architecture_is_its_options(architecture: str) -> None:
    """A frozen dataclass whose fields have defaults and are told in its docstring, for the command to offer."""
    kind = ARCHITECTURES[architecture]
    config = config_for(architecture)
    assert config.kind == kind() == replace(config, architecture=kind()).kind
    assert config.to_json() == replace(config, architecture=kind()).to_json()
    assert config.to_json()["architecture"] == architecture
    for field in fields(kind):
        assert f"\n        {field.name}: " in (kind.__doc__ or "")
        assert field.name in config.to_json()
        with pytest.raises(AttributeError):
            setattr(config.kind, field.name, None)


def test_the_options_of_jumprelu_reach_the_loss() -> None:
    x, found = planted(512), []
    for weight in (0.1, 3.0):
        config = replace(config_for("topk"), architecture=JumpReLUTraining(l0_weight=weight))
        layer, ranks = start(config, NAME, x, Ranks()), Ranks()
        scaled = x * layer.weights.scale
        values, active = config.kind.choose(config.shape, layer.weights, scaled, ranks)
        batch = Batch(scaled, 512.0, total_variance(scaled), ranks)
        pre = pre_acts_of(layer.weights, scaled, values, active, ranks)
        outcome = config.kind.forward(config.shape, layer.weights, batch, pre, active)
        l0 = float((outcome.acts > 0).sum()) / 512
        fvu = float((scaled - outcome.x_hat.detach()).square().sum() / batch.variance)
        assert float(outcome.loss.detach()) == pytest.approx(fvu + weight * (l0 / 6 - 1) ** 2, rel=1e-5)
        found.append(float(outcome.loss.detach()))
    assert found[0] < found[1]


def test_the_schedule() -> None:
    config = TrainConfig(d_sae=2**14, k=4, tokens=100 * 64, batch=64, warmup=10, decay=0.2, lr=2e-4)
    assert config.peak_lr == 2e-4
    lrs = [config.lr_at(step) / 2e-4 for step in range(100)]
    assert lrs[0] == pytest.approx(1 / 11)
    assert lrs[10:80] == pytest.approx([1.0] * 70)
    assert lrs[-1] == pytest.approx(1 / 21)
    assert lrs[81:] == sorted(set(lrs[81:]), reverse=True)


def test_rare_features_fare_better_than_with_adams_own_rates() -> None:
    """Residuals made of 96 directions, of which the n-th is in a share of 0.5 / n of the tokens."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(96, 24, generator=g), dim=1)
    shape = (400 * 64 + 8192, 96)
    present = torch.rand(shape, generator=g) < 0.5 / torch.arange(1, 97)
    x, held = (present * (1 + torch.rand(shape, generator=g)) @ directions).split([400 * 64, 8192])

    def made(**adam: Any) -> tuple[float, int]:
        config = TrainConfig(d_sae=96, k=4, tokens=len(x), batch=64, **adam)
        acts = (sae := train(config, ResidualTable({"layers.0": x}, batch=64))["layers.0"]).encode(held)
        unexplained = (held - sae.decode(acts)).square().sum() / (held - held.mean(0)).square().sum()
        return float(unexplained), 96 - len(acts.indices[acts.values > 0].unique())

    (mine, dead), (other, more_dead) = made(), made(betas=(0.9, 0.999))
    assert mine < 0.95 * other
    assert dead < more_dead


def test_the_default_learning_rate() -> None:
    def peak(steps: int) -> float:
        return TrainConfig(d_sae=2**16, k=4, tokens=64 * steps, batch=64).peak_lr

    assert peak(50_000) == peak(10**6) == pytest.approx(1e-4)
    assert peak(12_500) == pytest.approx(2e-4)
    assert peak(500) == peak(10) == pytest.approx(1e-3)


def test_a_very_short_run_calls_no_feature_dead() -> None:
    assert config_for("topk", tokens=512 * 99).dead_window is None
    assert config_for("topk", tokens=512 * 100).dead_window == 5120
    assert config_for("topk", tokens=10**9).dead_window == 10_000_000

"""Floor and cap against their formulas written out with plain tensors, alone, together and in a running model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from qwen_scope.cli import main
from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, LayerStats, blocks, capture
from qwen_scope.sae import SAE, JumpReLU, TopK
from qwen_scope.steer import Decoding, Intervention, Recipe, change_reference, generate, load_recipe, steering
from qwen_scope.steer.change import Change

D, W = tiny.D_MODEL, tiny.D_SAE
TOPK = tiny.random_sae(2)
JUMP = JumpReLU(TOPK.W_enc, TOPK.W_dec, TOPK.b_enc, TOPK.b_dec, torch.linspace(0, 4, W))


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def activation(sae: SAE, h: torch.Tensor, feature: int) -> torch.Tensor:
    """By the published formulas: the k largest, or those above their threshold, of relu(W h + b)."""
    pre = h @ sae.W_enc.T + sae.b_enc
    if isinstance(sae, JumpReLU):
        return torch.where(pre > sae.threshold, pre, torch.zeros(()))[:, feature]
    assert isinstance(sae, TopK)
    kept = pre.relu().topk(sae.k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, kept.indices, kept.values)[:, feature]


def by_formula(op: str, sae: SAE, h: torch.Tensor, feature: int, t: float) -> torch.Tensor:
    difference = t - activation(sae, h, feature)
    moved = difference.clamp(min=0) if op == "floor" else difference.clamp(max=0)
    return h + moved[:, None] * sae.W_dec[:, feature]


def sometimes_active(sae: SAE, h: torch.Tensor) -> int:
    """The feature that is active on the number of rows closest to half of them."""
    share = torch.tensor([float((activation(sae, h, f) > 0).float().mean()) for f in range(W)])
    return int((share - 0.5).abs().argmin())


@pytest.mark.parametrize("sae", [TOPK, JUMP], ids=["topk", "jumprelu"])
@pytest.mark.parametrize("op", ["floor", "cap"])
@pytest.mark.parametrize("n", [5, 200])
def test_the_formula(sae: SAE, op: str, n: int) -> None:
    h = rows(200)
    feature = sometimes_active(sae, h)
    a = activation(sae, h, feature)
    t = 1.01 * float(a[a > 0].median())
    some = a.argsort(descending=True)[torch.linspace(0, 199, n).long()]  # large and small activations
    h, a = h[some], a[some]
    one = getattr(Intervention, op)(layer=2, feature=feature, amount=t)
    out = one.apply(h, sae)
    torch.testing.assert_close(out, by_formula(op, sae, h, feature, t), atol=1e-5, rtol=1e-5)
    kept = a >= t if op == "floor" else a <= t
    assert 0 < kept.sum() < n, "some rows are on the right side and others are not"
    assert torch.equal(out[kept], h[kept])
    assert not torch.equal(out[~kept], h[~kept])


@pytest.mark.parametrize("sae", [TOPK, JUMP], ids=["topk", "jumprelu"])
def test_the_fast_path_is_the_reference(sae: SAE) -> None:
    h = rows(40, seed=3)
    f, g = sometimes_active(sae, h), sometimes_active(sae, rows(40, seed=4))
    g = g if g != f else (f + 1) % W
    several = [
        Intervention.floor(layer=2, feature=f, amount=1.0),
        Intervention.cap(layer=2, feature=f, amount=2.0),
        Intervention.cap(layer=2, feature=g, amount=0.5),
        Intervention.scale(layer=2, feature=(f + 7) % W, amount=3.0),
        Intervention.add(layer=2, feature=g, amount=0.25),
    ]
    for some in (several[:1], several[1:2], several[2:3], several[:2], several):
        change = Change.of(some, sae, h.device, h.dtype)
        torch.testing.assert_close(change(h[None], None)[0], change_reference(some, h, sae), atol=1e-5, rtol=1e-5)
    a = activation(sae, h, f)
    band = h + (a.clamp(1.0, 2.0) - a)[:, None] * sae.W_dec[:, f]
    torch.testing.assert_close(change_reference(several[:2], h, sae), band, atol=1e-5, rtol=1e-5)


def test_a_cap_that_nothing_exceeds_returns_the_residual_itself() -> None:
    h = rows(6)
    assert Intervention.cap(layer=2, feature=3, amount=1e5).apply(h, TOPK) is h
    assert Intervention.floor(layer=2, feature=3, amount=0.0).apply(h, TOPK) is h
    change = Change.of([Intervention.floor(layer=2, feature=3, amount=-1.0)], TOPK, h.device, h.dtype)
    assert torch.equal(change(h[None], None)[0], h)


def test_amounts_in_units() -> None:
    stats = LayerStats(HookPoint(2), 1, 9, "nine tokens", norm_median=8.0, norm_quantiles={0.5: 8.0},
                       feature_max=torch.full((W,), 3.0).numpy())  # fmt: skip
    for op in (Intervention.floor, Intervention.cap):
        assert op(layer=2, feature=5, amount=0.5, unit="max_act").resolve(stats, TOPK).amount == 1.5
        raw = op(layer=2, feature=5, amount=0.5, unit="resid_norm").resolve(stats, TOPK).amount
        assert raw * float(TOPK.W_dec[:, 5].norm()) == pytest.approx(4.0)


def test_a_running_model(scope, by_hand) -> None:
    """Prompt and generated tokens, under a KV cache, against a forward hook written out."""
    sae, prompt = scope.saes[2], "The quick brown fox"
    (h,) = capture(scope.model, scope.tokenize([prompt]).input_ids, [HookPoint(2)]).values()
    feature = sometimes_active(sae, h[0])
    prompts = {"floor": 6.0, "cap": 0.1}
    for op, t in prompts.items():
        one = getattr(Intervention, op)(layer=2, feature=feature, amount=t)
        with by_hand(blocks(scope.model)[2], lambda x, op=op, t=t: by_formula(op, sae, x[0], feature, t)[None]):
            (expected,) = generate(scope.model, scope.tokenizer, [prompt], decoding=Decoding(8), candidates=0)
        (found,) = generate(
            scope.model, scope.tokenizer, [prompt], [one], saes=scope.saes, decoding=Decoding(8), candidates=0
        )
        assert found.text == expected.text
        assert [t.probability for t in found.tokens] == pytest.approx([t.probability for t in expected.tokens])


def test_a_band_needs_its_floor_below_its_cap(scope) -> None:
    low, high = (Intervention.floor(layer=2, feature=5, amount=x) for x in (1.0, 3.0))
    cap = Intervention.cap(layer=2, feature=5, amount=2.0)
    with steering(scope.model, [cap, low], scope.saes):
        scope.model(scope.tokenize(["The quick"]).input_ids)
    for pair in ([high, cap], [cap, high], [low, low], [cap, cap.with_amount(3.0)]):
        with pytest.raises(InputError, match="set twice"), steering(scope.model, pair, scope.saes):
            pass


def test_a_direction_has_no_activation_to_bound() -> None:
    with pytest.raises(InputError, match="cap needs a feature"):
        Intervention(HookPoint(2), "cap", 1.0, direction=(1.0, 2.0))


def test_recipes_and_the_command(scope, tmp_path: Path, capsys) -> None:
    both = [
        Intervention.floor(layer=2, feature=5, amount=0.5, unit="max_act", where="generated"),
        Intervention.cap(layer=0, feature=6, amount=2.0),
    ]
    for ending in ("json", "yaml"):
        Recipe.of("band", scope.model, both, scope.saes).save(tmp_path / f"r.{ending}")
        found = load_recipe(tmp_path / f"r.{ending}").interventions
        assert [(i.op, i.amount, i.unit, str(i.where)) for i in found] == [
            ("floor", 0.5, "max_act", "generated"),
            ("cap", 2.0, "raw", "all"),
        ]
    lab = ("--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu", "--json")
    what = ("--feature", "2/5", "--op", "floor", "--amount", "2", "--unit", "raw")
    assert main(["steer", "The quick", *lab, *what, "--max-new-tokens", "4"]) == 0
    data = json.loads(capsys.readouterr().out)
    one = Intervention.floor(layer=2, feature=5, amount=2.0)
    assert data["interventions"] == [one.to_json()]
    (expected,) = generate(scope.model, scope.tokenizer, ["The quick"], [one], saes=scope.saes, decoding=Decoding(4))
    assert data["steered"]["text"] == expected.text

"""Gradients against finite differences, RelP against its conservation law, integrated gradients against their sum,
for dense, MoE and hybrid families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from siblings import IDS, LAYERS, scope_of

from qwen_scope.circuits import Method, Place, Quantity, ablated, effects, incoming, read
from qwen_scope.errors import InputError
from qwen_scope.model import relevance
from qwen_scope.scope import Scope

FAMILIES = ["qwen3", "qwen3_moe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "llama", "gemma2", "gemma3_text"]
QUANTITY = Quantity.difference(5, [40, 41])


def plain(scope: Scope, layer: int, position: int, step: torch.Tensor | float) -> float:
    """The quantity with one row of a block's output moved, through hooks of torch."""

    def move(module: object, args: object, out: torch.Tensor | tuple) -> torch.Tensor | tuple:
        h = (out[0] if isinstance(out, tuple) else out).clone()
        h[0, position] += step
        return (h, *out[1:]) if isinstance(out, tuple) else h

    hook = scope.model.model.layers[layer].register_forward_hook(move)
    logits = scope.model(torch.tensor([IDS]), use_cache=False).logits[0, -1]
    hook.remove()
    return float(logits[5] - (logits[40] + logits[41]) / 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_what_small_steps_do(family: str) -> None:
    scope = scope_of(family)
    reading = read(scope, IDS, QUANTITY)
    found = effects(reading, "gradient")
    for layer in LAYERS:
        one, width = reading.active[layer], 1e-4
        strongest = found.features[layer].abs().argsort(descending=True)[:3].tolist()
        for n in strongest:
            position, step = int(one.positions[n]), width * reading.decoder(layer)[n].double()
            slope = (plain(scope, layer, position, step) - plain(scope, layer, position, -step)) / (2 * width)
            assert float(found.features[layer][n]) == pytest.approx(slope, rel=2e-3, abs=1e-5)
        error = width * reading.errors[layer][-1].double()
        slope = (plain(scope, layer, len(IDS) - 1, error) - plain(scope, layer, len(IDS) - 1, -error)) / (2 * width)
        assert float(found.errors[layer][-1]) == pytest.approx(slope, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_relevance_is_conserved(family: str) -> None:
    """Without biases every layer's stream holds all of the value: `sum h . dm/dh = m` under RelP's rules."""
    reading = read(scope_of(family), IDS, QUANTITY)
    found = effects(reading, "relp")
    for layer in LAYERS:
        total = float(found.features[layer].sum() + found.errors[layer].sum()) + found.bases[layer]
        assert total == pytest.approx(reading.value, abs=1e-3), layer
    assert float(found.embeddings.sum()) == pytest.approx(reading.value, abs=1e-3)
    assert effects(reading, "gradient").features[0].sum() != pytest.approx(float(found.features[0].sum()), abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_relevance_changes_no_value_and_leaves_nothing_behind(family: str) -> None:
    scope = scope_of(family)
    ids = torch.tensor([IDS])
    before = scope.model(ids, use_cache=False).logits
    with relevance(scope.model):
        assert torch.equal(scope.model(ids, use_cache=False).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in scope.model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_5_moe_text"])
def test_integrated_gradients_add_up(family: str) -> None:
    reading = read(scope_of(family), IDS, QUANTITY)
    found = effects(reading, "ig")
    for layer in LAYERS:
        total = float(found.features[layer].sum() + found.errors[layer].sum())
        explained = reading.value - found.bases[layer]
        assert total == pytest.approx(explained, rel=0.01), layer
        assert found.gaps[layer] == pytest.approx(total - explained, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_baseline_of_integrated_gradients_is_the_stream_at_b_dec(family: str) -> None:
    if "moe" in family or family == "qwen3_next":
        pytest.skip("experts stay those of the prompt there")
    scope = scope_of(family)
    reading = read(scope, IDS, QUANTITY, [1])
    found = effects(reading, "ig")
    base = scope.saes[1].b_dec.double()

    def put(module: object, args: object, out: torch.Tensor | tuple) -> torch.Tensor | tuple:
        h = out[0] if isinstance(out, tuple) else out
        new = base.expand_as(h).clone()
        return (new, *out[1:]) if isinstance(out, tuple) else new

    hook = scope.model.model.layers[1].register_forward_hook(put)
    logits = scope.model(torch.tensor([IDS]), use_cache=False).logits[0, -1]
    hook.remove()
    assert found.bases[1] == pytest.approx(float(logits[5] - (logits[40] + logits[41]) / 2), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_is_a_run_without_the_node(family: str) -> None:
    scope = scope_of(family)
    reading = read(scope, IDS, QUANTITY)
    layer, one = 1, reading.active[1]
    places = [Place(layer, int(one.positions[n]), int(one.features[n])) for n in (0, 5, -1)]
    found = ablated(reading, [*([place] for place in places), [Place(layer, 4, None)]])
    steps = [-reading.decoder(layer)[n].double() for n in (0, 5, -1)]
    expected = [reading.value - plain(scope, layer, p.position, step) for p, step in zip(places, steps, strict=True)]
    expected.append(reading.value - plain(scope, layer, 4, -reading.errors[layer][4].double()))
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_are_what_small_steps_do_to_the_receiver(family: str) -> None:
    scope = scope_of(family)
    reading = read(scope, IDS, QUANTITY)
    one, last = reading.active[LAYERS[-1]], len(IDS) - 1
    receiver = Place(LAYERS[-1], last, int(one.features[one.positions == last][0]))
    found, into_target = incoming(reading, [receiver], "gradient")
    row = scope.saes[LAYERS[-1]].W_enc[receiver.feature].double()
    sender, width = int(found.features.abs().argmax()), 1e-4
    step = width * reading.decoder(1)[sender].double()
    position = int(reading.active[1].positions[sender])

    def pre(step: torch.Tensor) -> float:
        kept = []

        def keep(module: object, args: object, out: torch.Tensor | tuple) -> None:
            kept.append((out[0] if isinstance(out, tuple) else out)[0, last])

        hook = scope.model.model.layers[LAYERS[-1]].register_forward_hook(keep)
        plain(scope, 1, position, step)
        hook.remove()
        return float(kept[0] @ row)

    slope = (pre(step) - pre(-step)) / (2 * width)
    assert float(found.features[sender]) == pytest.approx(slope, rel=2e-3, abs=1e-5)
    by_effects = effects(reading, "gradient")
    torch.testing.assert_close(into_target.features, by_effects.features[LAYERS[-1]], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe_text"])
def test_kernels_of_experts_give_the_same_gradients(family: str) -> None:
    exact, usual = (read(scope_of(family, double), IDS, QUANTITY) for double in (True, False))
    for method in ("gradient", "relp"):
        one, other = effects(exact, method).features[1], effects(usual, method).features[1]
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-2)


class NoSlope(torch.autograd.Function):
    """A kernel that was never told its derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


@pytest.mark.parametrize("method", ["gradient", "relp", "ig", "joint"])
@pytest.mark.parametrize("kind", ["all detached", "one feed-forward layer detached", "no derivative"])
def test_a_model_whose_kernels_give_no_gradient_ends_in_one_sentence(
    kind: str, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = scope_of("qwen3")
    whole, mlp = scope.model.model, scope.model.model.layers[1].mlp
    forward = mlp.forward
    if kind == "all detached":
        monkeypatch.setattr(whole, "forward", torch.no_grad()(whole.forward))
    elif kind == "no derivative":
        monkeypatch.setattr(mlp, "forward", lambda x: NoSlope.apply(forward(x)))
    else:
        monkeypatch.setattr(mlp, "forward", torch.no_grad()(forward))
    reading = read(scope, IDS, QUANTITY)
    with pytest.raises(InputError, match="gives no gradient to explain") as error:
        effects(reading, method)
    assert "load the model unquantised" in str(error.value)
    assert "\n" not in str(error.value)

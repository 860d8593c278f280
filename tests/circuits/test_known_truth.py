"""Effects and edges against closed forms of models whose weights are set by hand."""

from __future__ import annotations

import planted
import pytest
import torch
from planted import AMOUNT, AND, CARRY, CONST, DOWN, FEATURE, GATE, IDS, SAID, SHARP, UP, A, B, C, D, E, X, silu

from qwen_scope.circuits import (
    Incoming,
    Method,
    Place,
    Quantity,
    Reading,
    WhyOptions,
    ablated,
    effects,
    explain,
    incoming,
    read,
)

PROMPT = "xaxd"
LAST = len(PROMPT) - 1
OF_B = DOWN * silu(GATE) * UP * AMOUNT[A]
"""B at the token "a", after block 0."""
OF_C = CARRY * OF_B / len(PROMPT)
"""C at the last token, after block 1: attention is uniform over four tokens."""
OF_E = AND * silu(SHARP * OF_C) * AMOUNT[D]
AND_SLOPE = AND * planted.slope_of_silu(SHARP * OF_C) * SHARP * OF_C * AMOUNT[D]
"""`C dE/dC`: more than E itself, because the gate is steeper than its ratio."""


@pytest.fixture(scope="module")
def reading() -> Reading:
    scope = planted.planted()
    return read(scope, [IDS[one] for one in PROMPT], Quantity.logit(IDS["t"]))


def place(layer: int, position: int, dimension: int) -> Place:
    return Place(layer, position, FEATURE[dimension])


def sent(found: Incoming, reading: Reading) -> dict[tuple[int, int], tuple[float, float]]:
    """By position and feature of the sender: the part passed along, and the part computed; without zeros."""
    assert found.layer is not None
    one = reading.active[found.layer]
    rows = zip(one.positions.tolist(), one.features.tolist(), found.features.tolist(), found.features_passed.tolist(),
               strict=True)  # fmt: skip
    return {(p, f): (passed, whole - passed) for p, f, whole, passed in rows if abs(whole) > 1e-7}


def test_the_stream_is_taken_apart(reading: Reading) -> None:
    assert reading.value == pytest.approx(SAID * OF_E, rel=1e-5)
    assert all(float(error.abs().max()) < 1e-6 for error in reading.errors.values())
    one = reading.active[1]
    found = {
        (p, f): v for p, f, v in zip(one.positions.tolist(), one.features.tolist(), one.values.tolist(), strict=True)
    }
    assert found[1, FEATURE[B]] == pytest.approx(OF_B / 2, rel=1e-5)
    assert found[LAST, FEATURE[C]] == pytest.approx(OF_C / 2, rel=1e-5)


@pytest.mark.parametrize("method", ["gradient", "relp"])
def test_a_copy_passes_along_the_stream_and_nothing_is_computed(reading: Reading, method: Method) -> None:
    found, _ = incoming(reading, [place(1, 1, B)], method)
    assert sent(found, reading) == {(1, FEATURE[B]): (pytest.approx(OF_B / 2, abs=1e-4), pytest.approx(0, abs=1e-4))}
    assert found.value == pytest.approx(OF_B / 2, abs=1e-5)
    assert found.constant == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("method", ["gradient", "relp"])
def test_a_head_carries_a_feature_to_a_later_token(reading: Reading, method: Method) -> None:
    found, _ = incoming(reading, [place(1, LAST, C)], method)
    assert sent(found, reading) == {(1, FEATURE[B]): (pytest.approx(0, abs=1e-4), pytest.approx(OF_C / 2, abs=1e-4))}


def test_an_mlp_turns_one_feature_into_another_with_its_gain(reading: Reading) -> None:
    found, _ = incoming(reading, [place(0, 1, B)], "gradient")
    assert found.layer is None
    by_gate = DOWN * UP * AMOUNT[A] * planted.slope_of_silu(GATE) * GATE  # the constant opens the gate
    expected = [0.0, (OF_B + by_gate) / 2, 0.0, 0.0]
    assert found.errors.tolist() == pytest.approx(expected, abs=1e-4)
    assert found.errors_passed.tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    assert found.constant == pytest.approx(-by_gate / 2, abs=1e-4)
    by_rules, _ = incoming(reading, [place(0, 1, B)], "relp")
    assert by_rules.errors.tolist() == pytest.approx([0.0, OF_B / 2, 0.0, 0.0], abs=1e-4)  # half by either factor
    assert by_rules.constant == pytest.approx(0, abs=1e-4)


def test_both_sides_of_an_and_send_edges(reading: Reading) -> None:
    found, _ = incoming(reading, [place(2, LAST, E)], "gradient")
    assert sent(found, reading) == {
        (LAST, FEATURE[C]): (pytest.approx(0, abs=1e-4), pytest.approx(AND_SLOPE / 2, abs=1e-4)),
        (LAST, FEATURE[D]): (pytest.approx(0, abs=1e-4), pytest.approx(OF_E / 2, abs=1e-4)),
    }
    by_rules, _ = incoming(reading, [place(2, LAST, E)], "relp")
    half = (pytest.approx(0, abs=1e-4), pytest.approx(OF_E / 4, abs=1e-4))
    assert sent(by_rules, reading) == {(LAST, FEATURE[C]): half, (LAST, FEATURE[D]): half}


def test_the_target_is_reached_along_the_stream_and_through_blocks(reading: Reading) -> None:
    (found,) = incoming(reading, [], "gradient")
    assert sent(found, reading) == {
        (LAST, FEATURE[E]): (pytest.approx(SAID * OF_E, abs=1e-4), pytest.approx(0, abs=1e-4))
    }
    below = read(reading.scope, reading.ids, reading.quantity, [0, 1])
    (found,) = incoming(below, [], "relp")
    half = (pytest.approx(0, abs=1e-4), pytest.approx(SAID * OF_E / 2, abs=1e-4))
    assert sent(found, below) == {(LAST, FEATURE[C]): half, (LAST, FEATURE[D]): half}


def test_another_features_activation_is_explained(reading: Reading) -> None:
    quantity = Quantity.activation(1, FEATURE[C])
    other = read(reading.scope, reading.ids, quantity)
    assert other.layers == (0,)
    assert other.value == pytest.approx(OF_C / 2, rel=1e-5)
    (found,) = incoming(other, [], "gradient")
    assert sent(found, other) == {(1, FEATURE[B]): (pytest.approx(0, abs=1e-4), pytest.approx(OF_C / 2, abs=1e-4))}
    assert ablated(other, [[place(0, 1, B)], [place(0, 0, X)]]).tolist() == pytest.approx([OF_C / 2, 0.0], abs=1e-4)


def test_effects_have_their_closed_forms(reading: Reading) -> None:
    def of(method: Method) -> dict[Place, float]:
        found = effects(reading, method)
        return {
            Place(layer, p, f): value
            for layer in reading.layers
            for p, f, value in zip(
                reading.active[layer].positions.tolist(),
                reading.active[layer].features.tolist(),
                found.features[layer].tolist(),
                strict=True,
            )
        }

    by_gradient, by_rules, integrated = of("gradient"), of("relp"), of("ig")
    assert by_gradient[place(0, 1, B)] == pytest.approx(SAID * AND_SLOPE, rel=1e-4)
    assert by_rules[place(0, 1, B)] == pytest.approx(SAID * OF_E / 2, rel=1e-4)
    assert by_rules[place(1, LAST, D)] == pytest.approx(SAID * OF_E / 2, rel=1e-4)
    # the product of silu(4 C t) and D t, whose derivatives along t are integrated from 0 to 1 by Simpson's rule
    n = 2000

    def share(t: float) -> float:
        return SAID * AND * planted.slope_of_silu(SHARP * OF_C * t) * SHARP * OF_C * AMOUNT[D] * t

    simpson = sum((1 if i in (0, n) else 4 if i % 2 else 2) * share(i / n) for i in range(n + 1)) / (3 * n)
    assert integrated[place(1, LAST, C)] == pytest.approx(simpson, rel=1e-4)
    assert integrated[place(1, LAST, C)] + integrated[place(1, LAST, D)] == pytest.approx(SAID * OF_E, rel=1e-4)
    exact = ablated(reading, [[place(1, LAST, C)], [place(1, LAST, D)], [place(1, 0, X)], [place(0, 1, CONST)]])
    assert exact.tolist() == pytest.approx([SAID * OF_E, SAID * OF_E, 0.0, 0.0], abs=1e-4)
    assert by_rules[place(2, 0, X)] == pytest.approx(0, abs=1e-7)


def test_mean_ablation_leaves_the_mean(reading: Reading) -> None:
    means = {layer: torch.full((8,), 0.1) for layer in reading.layers}
    exact = ablated(reading, [[place(2, LAST, E)]], means)
    assert exact.tolist() == pytest.approx([SAID * (OF_E - 2 * 0.1)], abs=1e-4)


def test_ablation_is_a_method_like_the_others(reading: Reading) -> None:
    """Without either side of the AND nothing is left, whatever the slopes say; what is not ablated keeps its slope."""
    found, first = effects(reading, "exact"), effects(reading, "gradient")
    active = reading.active[1]
    at = {(int(p), int(f)): n for n, (p, f) in enumerate(zip(active.positions, active.features, strict=True))}
    for dimension, slope in ((C, AND_SLOPE), (D, OF_E)):
        n = at[LAST, FEATURE[dimension]]
        assert float(found.features[1][n]) == pytest.approx(SAID * OF_E, rel=1e-5)
        assert float(first.features[1][n]) == pytest.approx(SAID * slope, rel=1e-4)
        assert found.exact[place(1, LAST, dimension)] == pytest.approx(SAID * OF_E, rel=1e-5)
    one = effects(reading, "exact", most=1)
    (ablated_one,) = one.exact
    assert ablated_one.layer in (0, 1)
    untouched = [layer for layer in reading.layers if layer != ablated_one.layer]
    assert all(torch.equal(one.features[layer], first.features[layer]) for layer in untouched)


def test_a_graph_by_ablation_has_exact_effects(reading: Reading) -> None:
    graph = explain(reading, WhyOptions(method="exact"))
    named = [graph.nodes[i] for i in graph.features]
    assert named
    assert all(node.exact == node.effect for node in named)
    assert graph.agreement is None, "there is no estimate to compare"

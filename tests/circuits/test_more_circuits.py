"""Hand-weighted circuits of further kinds against closed forms: two heads in sequence, an OR, a gain below zero, a
feature that is active at several tokens, targets of several tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import planted
import pytest
import torch
from planted import CONST, FEATURE, IDS, A, B, C, D, E, X
from torch import nn

from qwen_scope.circuits import (
    Graph,
    Place,
    Quantity,
    Reading,
    WhyOptions,
    ablated,
    effects,
    explain,
    faithfulness,
    graph_recipe,
    incoming,
    read,
)

PROMPT = "xaxd"
LAST = len(PROMPT) - 1
FIRST, SECOND, SAID = 0.9, 1.3, 5.0


def reading_of(
    wire: Callable[[nn.Module], None], quantity: Quantity, prompt: str = PROMPT, without: Sequence[int] = ()
) -> Reading:
    scope = planted.wired(wire, without)
    return read(scope, [IDS[one] for one in prompt], quantity)


def place(layer: int, position: int, dimension: int) -> Place:
    return Place(layer, position, FEATURE[dimension])


def by_place(reading: Reading, method: str = "gradient", steps: int = 10) -> dict[Place, float]:
    found = effects(reading, method, steps=steps)  # pyright: ignore[reportArgumentType]
    return {
        Place(layer, p, f): value
        for layer, one in reading.active.items()
        for p, f, value in zip(
            one.positions.tolist(), one.features.tolist(), found.features[layer].tolist(), strict=True
        )
    }


def edges_of(graph: Graph) -> dict[tuple[str, int, str, int], float]:
    nodes = graph.nodes
    return {
        (nodes[e.source].name, nodes[e.source].position, nodes[e.target].name, nodes[e.target].position): e.weight
        for e in graph.edges
    }


def two_heads(model: nn.Module) -> None:
    """Block 0 carries A to later tokens as B, block 1 carries B on as C, which says "t"."""
    planted.embed(model, "a", A, 2.0)
    planted.head(model, 0, A, B, FIRST)
    planted.head(model, 1, B, C, SECOND)
    planted.says(model, "t", C, SAID)


def test_two_heads_in_sequence_and_a_feature_that_is_active_at_several_tokens() -> None:
    reading = reading_of(two_heads, Quantity.logit(IDS["t"]))
    of_b = [FIRST * 2.0 * (p >= 1) / (p + 1) for p in range(4)]  # attention is uniform over a token and those before
    of_c = SECOND * sum(of_b) / 4
    assert reading.value == pytest.approx(SAID * of_c, rel=1e-5)
    found, _ = incoming(reading, [place(1, LAST, C)])
    one = reading.active[0]
    sent = {
        (p, f): weight
        for p, f, weight in zip(one.positions.tolist(), one.features.tolist(), found.features.tolist(), strict=True)
        if abs(weight) > 1e-7
    }
    assert sent == {(p, FEATURE[B]): pytest.approx(SECOND * of_b[p] / 4 / 2, abs=1e-4) for p in (1, 2, 3)}
    assert float(found.features_passed.abs().max()) < 1e-6
    effect = by_place(reading)
    alone = ablated(reading, [[place(0, p, B)] for p in (1, 2, 3)]).tolist()
    for p, exact in zip((1, 2, 3), alone, strict=True):
        closed = SAID * SECOND * of_b[p] / 4
        assert (effect[place(0, p, B)], exact) == (pytest.approx(closed, rel=1e-4), pytest.approx(closed, rel=1e-4))
    graph = explain(reading, WhyOptions(node_share=1.0))
    b, c = f"0/{FEATURE[B]}", f"1/{FEATURE[C]}"
    assert {(name, p) for name, p, _, _ in edges_of(graph)} == {
        ("embedding", 1), *((b, p) for p in (1, 2, 3)), (c, LAST), (f"2/{FEATURE[C]}", LAST)
    }  # fmt: skip
    fires = next(node.fires for node in graph.nodes if node.name == b)
    assert dict(fires) == {p: pytest.approx(of_b[p] / 2, rel=1e-4) for p in (1, 2, 3)}
    recipe = graph_recipe(graph, reading.scope)
    added = {(one.layer, one.feature): one.amount for one in recipe.interventions}
    assert added[0, FEATURE[B]] == pytest.approx(max(of_b) / 2, rel=1e-4), "once, with its largest activation"


SHARP = 6.0


def either(model: nn.Module) -> None:
    """Block 1 writes E where A or D is, and not twice as much where both are."""
    planted.embed(model, "a", A, 1.0)
    planted.embed(model, "a", D, 1.0)
    planted.embed(model, "d", D, 1.0)
    for unit, (less, gain) in enumerate(((0.0, 1 / SHARP), (SHARP, -1 / SHARP))):
        planted.unit(model, 1, unit, {A: SHARP, D: SHARP, CONST: -less}, CONST, E, gain)
    planted.says(model, "t", E, SAID)


def either_of(x: float) -> float:
    return (planted.silu(SHARP * x) - planted.silu(SHARP * (x - 1))) / SHARP


def test_an_or_has_two_sides_that_each_suffice() -> None:
    reading = reading_of(either, Quantity.logit(IDS["t"]), "xxa", without=[CONST])  # so that it is there throughout
    assert reading.value == pytest.approx(SAID * either_of(2), rel=1e-5)
    sides = [place(0, 2, A), place(0, 2, D)]
    lost = SAID * (either_of(2) - either_of(1))
    assert ablated(reading, [[one] for one in sides]).tolist() == pytest.approx([lost, lost], abs=1e-4)
    assert abs(lost) < 0.02 * reading.value, "either side suffices"
    both = SAID * (either_of(2) - either_of(0))
    assert ablated(reading, [sides]).tolist() == pytest.approx([both], abs=1e-4)
    slope = SAID * (planted.slope_of_silu(2 * SHARP) - planted.slope_of_silu(SHARP))
    by_slope, together = by_place(reading), by_place(reading, "joint", steps=400)
    assert [by_slope[one] for one in sides] == pytest.approx([slope, slope], abs=1e-4)
    assert together[sides[0]] == pytest.approx(together[sides[1]], rel=1e-4)
    # growing from nothing both matter, up to where one alone would do; E is shrunk at two layers on the way
    points = [(n + 0.5) / 4000 for n in range(4000)]
    share = sum(
        SAID * t**2 * (planted.slope_of_silu(2 * SHARP * t) - planted.slope_of_silu(SHARP * (2 * t - 1)))
        for t in points
    ) / len(points)  # fmt: skip
    assert together[sides[0]] == pytest.approx(share, rel=1e-2)
    assert share > 0 > slope
    graph = explain(reading)
    named = [node for node in graph.nodes if node.kind == "feature"]
    assert {node.name for node in named if node.layer == 0} == {f"0/{FEATURE[A]}", f"0/{FEATURE[D]}"}
    (kept,) = faithfulness(reading, [[Place(n.layer or 0, n.position, n.feature) for n in named]])
    assert kept.faithfulness == pytest.approx(1, abs=0.05)


LESS = 0.3


def against(model: nn.Module) -> None:
    """Block 1 takes from X what A brings: a gain below zero."""
    planted.embed(model, "a", A, 2.0)
    planted.embed(model, "a", X, 1.5)
    planted.unit(model, 1, 0, {CONST: planted.GATE}, A, X, -LESS)
    planted.says(model, "t", X, SAID)


def test_a_gain_below_zero_is_an_effect_below_zero() -> None:
    reading = reading_of(against, Quantity.logit(IDS["t"]), "xa")
    taken = LESS * planted.silu(planted.GATE) * 2.0
    assert reading.value == pytest.approx(SAID * (1.5 - taken), rel=1e-5)
    found, _ = incoming(reading, [place(1, 1, X)])
    one = reading.active[0]
    for p, f, weight, passed in zip(
        one.positions.tolist(), one.features.tolist(), found.features.tolist(), found.features_passed.tolist(),
        strict=True,
    ):  # fmt: skip
        if (p, f) == (1, FEATURE[A]):
            assert (weight, passed) == (pytest.approx(-taken / 2, abs=1e-4), pytest.approx(0, abs=1e-6))
        elif (p, f) == (1, FEATURE[X]):
            assert (weight, passed) == (pytest.approx(1.5 / 2, abs=1e-4), pytest.approx(1.5 / 2, abs=1e-4))
    assert ablated(reading, [[place(0, 1, A)]]).tolist() == pytest.approx([-SAID * taken], abs=1e-4)
    graph = explain(reading, WhyOptions(node_share=1.0))
    effect = {node.name: node.effect for node in graph.nodes if node.layer == 0 and node.kind == "feature"}
    assert effect[f"0/{FEATURE[A]}"] == pytest.approx(-SAID * taken, rel=1e-4)
    against_it = [one for one in graph_recipe(graph, reading.scope).interventions if one.feature == FEATURE[A]]
    assert not against_it, "what lowers the answer is not added"


def test_targets_of_several_tokens() -> None:
    """The mean of logits, its difference to others, and the log-probability of either."""

    def wire(model: nn.Module) -> None:
        planted.embed(model, "a", A, 2.0)
        for word, gain in (("t", 3.0), ("d", 1.0), ("x", -2.0)):
            planted.says(model, word, A, gain)

    t, d, x = IDS["t"], IDS["d"], IDS["x"]
    mean = reading_of(wire, Quantity.logit(t, d), "xa")
    assert mean.value == pytest.approx(2.0 * (3.0 + 1.0) / 2, rel=1e-5)
    assert by_place(mean)[place(2, 1, A)] == pytest.approx(mean.value, rel=1e-4)
    apart = reading_of(wire, Quantity.difference([t, d], x), "xa")
    assert by_place(apart)[place(2, 1, A)] == pytest.approx(2.0 * (2.0 + 2.0), rel=1e-4)
    sure = reading_of(wire, Quantity.log_prob(t, d), "xa")
    logits = torch.zeros(300)
    logits[[t, d, x]] = torch.tensor([6.0, 2.0, -4.0])
    assert sure.value == pytest.approx(math.log(float(logits.softmax(-1)[[t, d]].sum())), rel=1e-4)
    spread = logits.softmax(-1)
    among = spread[[t, d]] / spread[[t, d]].sum()
    slope = float(among @ torch.tensor([3.0, 1.0]) - spread[[t, d, x]] @ torch.tensor([3.0, 1.0, -2.0]))
    assert by_place(sure)[place(2, 1, A)] == pytest.approx(2.0 * slope, rel=1e-3)

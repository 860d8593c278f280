"""Scores of graphs against what is known of planted models, and against runs by plain hooks."""

from __future__ import annotations

from dataclasses import replace

import planted
import pytest
import torch
from planted import CONST, FEATURE, IDS, B, C, D, E, X
from siblings import IDS as SIBLING_IDS
from siblings import LAYERS, scope_of

from qwen_scope.circuits import (
    Place,
    Quantity,
    Reading,
    Stability,
    effects,
    explain,
    faithfulness,
    incoming,
    overlap,
    read,
    stability,
)
from qwen_scope.circuits import tracer_scores as scores_of
from qwen_scope.circuits.graph import Edge, Ladder, Node
from qwen_scope.errors import InputError

LAST = 3


@pytest.fixture(scope="module")
def reading() -> Reading:
    return read(planted.planted(), [IDS[one] for one in "xaxd"], Quantity.logit(IDS["t"]))


def places(*named: tuple[int, int, int]) -> list[Place]:
    return [Place(layer, position, FEATURE[dimension]) for layer, position, dimension in named]


CIRCUIT = places((0, 1, B), (0, LAST, D), (1, LAST, C), (1, LAST, D), (2, LAST, E))


def test_the_planted_circuit_is_faithful_and_complete(reading: Reading) -> None:
    whole, without_d, nothing = faithfulness(reading, [CIRCUIT, CIRCUIT[:1] + CIRCUIT[2:], places((0, 0, X))])
    assert whole.all == pytest.approx(reading.value, rel=1e-5)
    assert whole.none == 0
    assert whole.faithfulness == pytest.approx(1, abs=1e-5)
    assert whole.completeness == pytest.approx(0, abs=1e-6)
    assert without_d.faithfulness == pytest.approx(0, abs=1e-6), "an AND needs both"
    assert (nothing.faithfulness, nothing.completeness) == (pytest.approx(0), pytest.approx(1))


def test_ablated_features_can_keep_a_mean(reading: Reading) -> None:
    means = {layer: torch.zeros(8) for layer in reading.layers}
    means[2][FEATURE[E]] = 0.25
    (found,) = faithfulness(reading, [places((2, LAST, E))], means=means)
    assert found.removed == pytest.approx(planted.SAID * 2 * 0.25, rel=1e-5)
    (found,) = faithfulness(reading, [places((0, 1, CONST))], means=means)
    assert found.none == pytest.approx(planted.SAID * 2 * 0.25, rel=1e-5)


@pytest.mark.parametrize("errors", [True, False])
def test_a_set_is_what_stays_when_every_layer_is_rebuilt(errors: bool) -> None:
    scope = scope_of("qwen3")
    reading = read(scope, SIBLING_IDS, Quantity.logit(5))
    kept = {}
    for layer in LAYERS:
        one = reading.active[layer]
        kept[layer] = {(int(p), int(f)) for p, f in zip(one.positions[::3], one.features[::3], strict=True)}

    def rebuild(layer: int):
        def hook(module: object, args: object, out: torch.Tensor | tuple) -> torch.Tensor | tuple:
            h = (out[0] if isinstance(out, tuple) else out).clone()
            sae = scope.saes[layer]
            for position in range(1, h.shape[1]):  # the first token does not count
                pre = sae.W_enc @ h[0, position].float() + sae.b_enc
                dense = torch.zeros(sae.d_sae).scatter(0, pre.relu().topk(sae.k).indices, pre.relu().topk(sae.k).values)
                mine = torch.tensor([(position, f) in kept[layer] for f in range(sae.d_sae)])
                new = sae.W_dec @ (dense * mine) + sae.b_dec
                if errors:
                    new = new + h[0, position].float() - sae.W_dec @ dense - sae.b_dec
                h[0, position] = new.double()
            return (h, *out[1:]) if isinstance(out, tuple) else h

        return hook

    hooks = [scope.model.model.layers[layer].register_forward_hook(rebuild(layer)) for layer in LAYERS]
    expected = float(scope.model(torch.tensor([SIBLING_IDS]), use_cache=False).logits[0, -1, 5])
    for one in hooks:
        one.remove()
    group = [Place(layer, p, f) for layer in LAYERS for p, f in kept[layer]]
    (found,) = faithfulness(reading, [group], errors=errors)
    assert found.kept == pytest.approx(expected, abs=1e-4)
    assert (found.all == pytest.approx(reading.value, abs=1e-4)) is errors


def test_scores_of_the_tracer_on_a_graph_without_errors(reading: Reading) -> None:
    found = scores_of(reading, CIRCUIT, incoming(reading, CIRCUIT, "gradient"))
    assert (found.replacement, found.completeness) == (pytest.approx(1), pytest.approx(1))


def test_scores_of_the_tracer_are_those_of_its_matrix() -> None:
    """circuit-tracer's definition over one square matrix of all nodes, by its series of powers."""
    reading = read(scope_of("qwen3"), SIBLING_IDS, Quantity.logit(5))
    chosen = []
    for layer in LAYERS:
        one = reading.active[layer]
        best = effects(reading, "gradient").features[layer].abs().topk(8).indices
        chosen += [Place(layer, int(one.positions[n]), int(one.features[n])) for n in best]
    edges = incoming(reading, chosen, "gradient")
    n, seq = len(chosen), len(SIBLING_IDS)
    before = {1: 0, LAYERS[-1]: 1, None: LAYERS[-1]}
    size = n + seq * len(LAYERS) + seq + 1
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for row, one in enumerate(edges):
        row = size - 1 if one.receiver is None else row
        if one.layer is None:
            matrix[row, n + seq * len(LAYERS) : -1] = one.errors.abs().double()
            continue
        assert one.layer == before[None if one.receiver is None else one.receiver.layer]
        start = n + seq * LAYERS.index(one.layer)
        matrix[row, start : start + seq] = one.errors.abs().double()
        active = reading.active[one.layer]
        for i, place in enumerate(chosen):
            if place.layer == one.layer:
                where = (active.positions == place.position) & (active.features == place.feature)
                matrix[row, i] = float(one.features[where].abs())
    matrix = matrix / matrix.sum(1, keepdim=True).clamp(min=1e-12)
    weight = torch.zeros(size, dtype=torch.float64)
    weight[-1] = 1
    influence, step = torch.zeros(size, dtype=torch.float64), weight @ matrix
    for _ in range(size):
        influence, step = influence + step, step @ matrix
    by_tokens, by_errors = influence[n + seq * len(LAYERS) : -1].sum(), influence[n : n + seq * len(LAYERS)].sum()
    fraction = 1 - matrix[:, n : n + seq * len(LAYERS)].sum(1)
    output = influence + weight
    found = scores_of(reading, chosen, edges)
    assert found.replacement == pytest.approx(float(by_tokens / (by_tokens + by_errors)), abs=1e-6)
    assert found.completeness == pytest.approx(float((fraction * output).sum() / output.sum()), abs=1e-6)


def test_graphs_agree_on_what_they_share(reading: Reading) -> None:
    graph = explain(reading)
    other = explain(read(reading.scope, [IDS[one] for one in "axxd"], Quantity.logit(IDS["t"])))
    assert overlap(graph, other) == 1
    copied = explain(read(reading.scope, reading.ids, Quantity.activation(2, FEATURE[X], 0)))
    assert overlap(graph, copied) == 0


def test_paths_end_where_two_ladders_send_to_each_other(reading: Reading) -> None:
    nodes = [Node("feature", 0, layer, feature) for layer in (0, 1, 2) for feature in (1, 2)]
    edges = [Edge(0, 3, 1.0, 0.0, 0.9), Edge(3, 4, 1.0, 0.0, 0.9), Edge(4, 6, 1.0, 1.0, 1.0), Edge(1, 2, 1.0, 0.0, 0.9)]
    ladders = (Ladder((0, 2, 4), 0), Ladder((1, 3, 5), 0))
    graph = replace(explain(reading), nodes=(*nodes, Node("target", 0)), edges=tuple(edges), ladders=ladders)
    assert [path.nodes for path in graph.paths(3)] == [(1, 0, 6)]


def test_paraphrases_are_told_from_unrelated_prompts(reading: Reading) -> None:
    said = explain(reading)
    again = explain(read(reading.scope, [IDS[one] for one in "axxd"], Quantity.logit(IDS["t"])))
    other = explain(read(reading.scope, reading.ids, Quantity.activation(2, FEATURE[X], 0)))
    assert stability([[said, again], [other]]) == Stability(paraphrases=1.0, unrelated=0.0)
    mixed = stability([[said, other], [again]])
    assert (mixed.paraphrases, mixed.unrelated) == (0.0, 0.5)
    for groups in ([[said, again]], [[said], [other]]):
        with pytest.raises(InputError, match="groups of paraphrases"):
            stability(groups)


def test_what_features_add_together_sums_to_what_they_carry(reading: Reading) -> None:
    """On the planted model the AND gives half to either side of every layer's share, and all sum to the value."""
    found = effects(reading, "joint", steps=200)
    total = sum(float(one.sum()) for one in found.features.values())
    (whole,) = faithfulness(reading, [CIRCUIT])
    assert total == pytest.approx(whole.all - whole.none, rel=2e-2)
    for layer in reading.layers:
        one = reading.active[layer]
        outside = [
            value
            for p, f, value in zip(one.positions.tolist(), one.features.tolist(), found.features[layer], strict=True)
            if Place(layer, p, f) not in CIRCUIT
        ]
        assert all(abs(float(value)) < 0.02 * total for value in outside)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text"])
def test_the_slope_along_the_way_is_that_of_the_masks(family: str) -> None:
    """One point of the way by finite differences: one feature's share is moved, those of all others stay."""
    scope = scope_of(family)
    reading = read(scope, SIBLING_IDS, Quantity.logit(5))
    layer = LAYERS[1]
    one = reading.active[layer]
    found = effects(reading, "joint", steps=1).features[layer]
    n = int(found.abs().argmax())
    place = Place(layer, int(one.positions[n]), int(one.features[n]))

    def value(share: float) -> float:
        def change(at: int):
            sae = scope.saes[at]

            def grown(h: torch.Tensor) -> torch.Tensor:
                new = h.clone()
                for position in range(1, h.shape[1]):
                    pre = sae.W_enc @ h[0, position].float() + sae.b_enc
                    top = pre.relu().topk(sae.k)
                    shares = torch.full_like(top.values, 0.5)
                    if (at, position) == (layer, place.position):
                        shares[top.indices == place.feature] = share
                    new[0, position] -= (sae.W_dec[:, top.indices] @ (top.values * (1 - shares))).double()
                return new

            return grown

        with torch.no_grad():
            return float(reading.run(reading.copies(1), {at: change(at) for at in LAYERS}))

    step = 1e-3
    assert float(found[n]) == pytest.approx((value(0.5 + step) - value(0.5 - step)) / (2 * step), rel=2e-2)


def test_what_makes_no_sense_is_refused(reading: Reading) -> None:
    with pytest.raises(InputError, match="sets of features"):
        faithfulness(reading, [[Place(0, 1, None)]])
    unmoved = read(reading.scope, reading.ids, Quantity.logit(IDS["a"]))
    with pytest.raises(InputError, match="same with and without"):
        faithfulness(unmoved, [CIRCUIT])

"""Graphs: the planted path and nothing else, ladders, what is left out, the file format, recipes."""

from __future__ import annotations

from dataclasses import replace

import planted
import pytest
from planted import FEATURE, IDS, A, B, C, D, E, X

from qwen_scope import load_scope
from qwen_scope.circuits import Graph, Quantity, WhyOptions, explain, graph_recipe, read
from qwen_scope.circuits.graph import Edge, Node, find_ladders
from qwen_scope.errors import InputError
from qwen_scope.lab import documents
from qwen_scope.scope import Scope
from qwen_scope.steer import load_recipe

PROMPT = "xaxd"
OF_C = planted.CARRY * planted.DOWN * planted.silu(planted.GATE) * planted.UP * planted.AMOUNT[A] / len(PROMPT)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return explain(read(planted.planted(), [IDS[one] for one in PROMPT], Quantity.logit(IDS["t"])))


@pytest.fixture(scope="module")
def lab_scope() -> Scope:
    return load_scope("lab", device="cpu")


@pytest.fixture(scope="module")
def lab_graph(lab_scope: Scope) -> Graph:
    text = next(iter(documents(seed=8, n=1))).text
    ids = lab_scope.tokenizer(text)["input_ids"][:24]
    return explain(read(lab_scope, ids, Quantity.logit(ids[-1])), WhyOptions(nodes=60, exact=12))


def named(graph: Graph, i: int) -> tuple[str, int]:
    node = graph.nodes[i]
    return node.name, node.position


@pytest.mark.parametrize("method", ["gradient", "relp", "ig"])
def test_the_graph_is_exactly_the_planted_path(method: str) -> None:
    reading = read(planted.planted(), [IDS[one] for one in PROMPT], Quantity.logit(IDS["t"]))
    graph = explain(reading, WhyOptions(method=method, node_share=1.0))
    f = FEATURE
    expected = {
        ("embedding", 1): [(f"0/{f[B]}", 1)],
        ("embedding", 3): [(f"0/{f[D]}", 3)],
        (f"0/{f[B]}", 1): [(f"1/{f[C]}", 3)],
        (f"0/{f[D]}", 3): [(f"1/{f[D]}", 3)],
        (f"1/{f[C]}", 3): [(f"2/{f[E]}", 3)],
        (f"1/{f[D]}", 3): [(f"2/{f[E]}", 3)],
        (f"2/{f[E]}", 3): [("target", 3)],
    }
    found: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for edge in graph.edges:
        found.setdefault(named(graph, edge.source), []).append(named(graph, edge.target))
    assert found == expected
    assert {named(graph, i) for i in range(len(graph.nodes))} == {*expected, ("target", 3)}
    assert f[A] not in {node.feature for node in graph.nodes if node.layer}, "A is turned into B and used no more"
    assert f[X] not in {node.feature for node in graph.nodes}


def test_a_feature_that_passes_through_layers_is_one_ladder(graph: Graph) -> None:
    by_name = {tuple(named(graph, i) for i in one.nodes): one.written for one in graph.ladders}
    d = FEATURE[D]
    assert by_name[(f"0/{d}", 3), (f"1/{d}", 3)] is None, "the token itself brings D"
    assert by_name[((f"1/{FEATURE[C]}", 3),)] == 1
    assert by_name[((f"0/{FEATURE[B]}", 1),)] == 0
    assert sorted(i for one in graph.ladders for i in one.nodes) == sorted(graph.features)


def test_layers_that_were_skipped_are_told() -> None:
    reading = read(planted.planted(), [IDS[one] for one in PROMPT], Quantity.logit(IDS["t"]), [0, 2])
    graph = explain(reading)
    (last,) = [one for one in graph.ladders if graph.nodes[one.nodes[0]].layer == 2]
    assert graph.written_by(last) == "blocks 1 to 2"
    assert {graph.written_by(one) for one in graph.ladders} == {"blocks 1 to 2", "block 0", "the token"}


def test_a_path_goes_back_along_the_largest_shares(graph: Graph) -> None:
    (path,) = graph.paths()
    names = [named(graph, i)[0] for i in path.nodes]
    assert names == ["embedding", f"0/{FEATURE[B]}", f"1/{FEATURE[C]}", f"2/{FEATURE[E]}", "target"]
    assert path.weight == pytest.approx(graph.value, rel=1e-4)
    both = planted.slope_of_silu(x := planted.SHARP * OF_C) * x, planted.silu(x)  # by C and by D, over AND and D
    assert path.shares == pytest.approx((1, 1, both[0] / sum(both), 1), rel=1e-4)


@pytest.mark.slow
def test_what_is_left_out_is_counted(lab_graph: Graph) -> None:
    for shares in lab_graph.shares.values():
        assert shares.kept + shares.left_out + shares.errors == pytest.approx(1)
        assert shares.n_left_out > 0
    features = [i for i, node in enumerate(lab_graph.nodes) if node.kind == "feature"]
    assert set(lab_graph.received) == {*features, lab_graph.target}
    for one in lab_graph.received.values():
        assert one.kept + one.features + one.errors + one.embeddings == pytest.approx(1, abs=1e-5)
    assert lab_graph.edges_left_out > 0
    assert len(features) == 60


def test_a_budget_and_thresholds_hold(lab_scope: Scope, lab_graph: Graph) -> None:
    assert all(edge.share >= 0.02 for edge in lab_graph.edges)
    reading = read(lab_scope, lab_graph.ids, Quantity.logit(lab_graph.answer[0]))
    small = explain(reading, WhyOptions(nodes=8, edges=5, exact=0))
    assert len(small.features) <= 8
    assert len(small.edges) == 5
    assert small.agreement is None
    by_share = sorted(lab_graph.features, key=lambda i: -abs(lab_graph.nodes[i].share or 0))
    largest = {(lab_graph.nodes[i].name, lab_graph.nodes[i].position) for i in by_share[:8]}
    assert {(small.nodes[i].name, small.nodes[i].position) for i in small.features} == largest


def test_ladders_end_where_a_block_writes_most() -> None:
    nodes = [Node("feature", 0, layer, 5) for layer in range(4)]
    edges = [Edge(0, 1, 2.0, 1.8, 0.9), Edge(1, 2, 2.0, 0.4, 0.9), Edge(2, 3, 2.0, 2.4, 0.9)]
    assert [one.nodes for one in find_ladders(nodes, edges)] == [(0, 1), (2, 3)]


def test_a_recipe_of_the_graph_can_be_saved_and_raises_the_target(graph: Graph, tmp_path) -> None:
    scope = planted.planted()
    recipe = graph_recipe(graph, scope)
    recipe.save(tmp_path / "why.json")
    again = load_recipe(tmp_path / "why.json")
    again.check(scope.model, scope.saes)
    assert (2, FEATURE[E]) in {(one.layer, one.feature) for one in again.interventions}
    assert all(one.op == "add" and one.amount > 0 for one in again.interventions)
    with pytest.raises(InputError, match="no feature of this graph"):
        graph_recipe(graph, scope, nodes=[graph.target])
    against = replace(graph, nodes=tuple(replace(node, effect=-abs(node.effect)) for node in graph.nodes))
    with pytest.raises(InputError, match="nothing to add"):
        graph_recipe(against, scope)

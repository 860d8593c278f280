"""The Why tab behind the page: bounds, what it makes of fields, labels on nodes, and the recipe of a graph."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from explored import LAYER

from qwen_scope.circuits import Graph, Question, WhyOptions, ask, explain, read
from qwen_scope.errors import QwenScopeError
from qwen_scope.explorer import AppState, Limits
from qwen_scope.explorer.jobs import Told, watched
from qwen_scope.explorer.look.feature import effects_panel
from qwen_scope.explorer.look.why import graph_panel
from qwen_scope.explorer.tabs.why import explained, recipe_rows
from qwen_scope.features import Label, Lens, Notes, make_label, names_of
from qwen_scope.stats import Interval

PROMPT = "Guten Morgen, wo ist"
FIELDS: dict[str, Any] = {"token": " der", "against": " the", "position": -1, "method": "gradient", "nodes": 12}


@pytest.fixture(scope="module")
def graph(state: AppState) -> Graph:
    return explained(state, PROMPT, "plain", FIELDS)


def test_the_graph_is_that_of_the_library_under_the_pages_own_names(state: AppState, graph: Graph) -> None:
    found = ask(state.scope, PROMPT, Question(" der", " the"))
    reading = read(state.scope, found.ids, found.quantity, tokens=found.tokens)
    plain = explain(reading, WhyOptions(nodes=12, exact=12), labels=names_of(state.scope))
    assert graph == replace(plain, model=state.model_name, group=state.sae_name)
    assert str(state.scope.name) not in json.dumps(graph.to_json())


DEEP: Any = "x"
for _ in range(100):
    DEEP = [DEEP] * 2

REFUSED = [
    ({"prompt": ["a"]}, "the prompt is empty"),
    ({"prompt": "x" * 20_001}, "reads up to 20,000"),
    ({"prompt": "so " * 300}, "the prompt has 30. tokens and this page makes graphs of up to 256"),
    ({"token": "Donaudampfschiff"}, "name one token"),
    ({"token": DEEP}, "token is a text of up to 200 characters"),
    ({"token": "x" * 201}, "token is a text of up to 200 characters"),
    ({"against": " der"}, "the same"),
    ({"feature": "4/3"}, "leave the other field empty"),
    ({"token": None, "against": "", "feature": "4"}, "4"),
    ({"token": None, "against": "", "feature": "0/3"}, "no layer below 0"),
    ({"position": 99}, "position 99 does not exist"),
    ({"position": 10**400}, "whole number"),
    ({"method": "magic"}, "a method is one of"),
    ({"method": DEEP}, "a method is one of"),
    ({"nodes": 301}, "1 to 300 features, not 301"),
    ({"nodes": -1}, "1 to 300 features, not -1"),
    ({"chat": "loud"}, "one of plain"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_is_refused_is_one_short_sentence(state: AppState, given: dict[str, Any], says: str) -> None:
    fields = {**FIELDS, **given}
    with pytest.raises(QwenScopeError, match=says) as error:
        explained(state, fields.pop("prompt", PROMPT), fields.pop("chat", "plain"), fields)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def test_long_work_tells_how_far_it_is_and_stops(state: AppState) -> None:
    def parts(stop: threading.Event) -> Iterator[Told | Graph]:
        return watched(lambda progress: explained(state, PROMPT, "plain", FIELDS, progress), stop)

    told = list(parts(threading.Event()))
    assert {one.stage for one in told[:-1] if isinstance(one, Told)} >= {"reading", "effects", "ablation", "edges"}
    assert isinstance(told[-1], Graph)
    stop = threading.Event()
    going = parts(stop)
    next(going)
    stop.set()
    assert not any(isinstance(one, Graph) for one in going)


def test_a_frame_reaches_nothing_of_the_page(graph: Graph) -> None:
    markup = graph_panel(replace(graph, prompt="</iframe>", quantity='" onload="alert(1)'))
    assert 'sandbox="allow-scripts"' in markup
    assert markup.count("</iframe>") == 1
    assert 'onload="' not in markup


def test_nodes_are_named_where_a_store_has_a_label(state: AppState, graph: Graph) -> None:
    node = next(node for node in graph.nodes if node.layer == LAYER and node.feature is not None)
    assert node.feature is not None
    half, sure = Interval(0.8, 0.7, 0.9, 20), Interval(1.0, 0.9, 1.0, 20)
    with state.store("german") as store:
        label = Label("an article", half, sure, "judge", "judge")
        Notes(store).add(make_label(LAYER, node.feature, store.layer(LAYER).fingerprint, label))
    again = explained(state, PROMPT, "plain", FIELDS)
    labels = {(one.layer, one.feature): one.label for one in again.nodes if one.label}
    assert labels == {(LAYER, node.feature): "an article (0.90)"}


def test_a_recipe_takes_the_strongest_or_those_that_are_pinned(state: AppState, graph: Graph) -> None:
    name, rows = recipe_rows(state, graph, "[]")
    assert "logit of ' der'" in name
    raising = [graph.nodes[i] for i in graph.features if graph.nodes[i].effect > 0]
    assert (rows[0]["layer"], rows[0]["feature"]) == (raising[0].layer, raising[0].feature)
    assert all(row["op"] == "add" and row["unit"] == "raw" for row in rows)
    assert rows[0]["amount"] == pytest.approx(raising[0].activation, rel=1e-3)
    pinned = graph.features[-7:]
    _, chosen = recipe_rows(state, graph, json.dumps([*pinned, graph.target]))
    named = {(graph.nodes[i].layer, graph.nodes[i].feature) for i in pinned}
    assert {(row["layer"], row["feature"]) for row in chosen} == named


@pytest.mark.parametrize(
    ("pins", "limits", "says"),
    [
        (None, Limits(), "press Explain first"),
        ("none", Limits(), "none of the pinned nodes is a feature"),
        ("target", Limits(), "none of the pinned nodes is a feature"),
        ("all", Limits(interventions=5), "up to 5 at a time"),
    ],
)
def test_a_recipe_that_is_none_is_refused(
    state: AppState, graph: Graph, pins: str | None, limits: Limits, says: str
) -> None:
    own = AppState(state.scope, limits=limits)
    nodes = {"target": [graph.target], "all": graph.features, "none": [10**6]}.get(pins or "", [])
    with pytest.raises(QwenScopeError, match=says):
        recipe_rows(own, None if pins is None else graph, json.dumps(nodes))


@pytest.mark.parametrize("pins", ["[[[[", "x" * 100_000, "[-1]", "", "[1e5]"])
def test_pins_that_are_no_numbers_are_left_out(state: AppState, graph: Graph, pins: str) -> None:
    assert recipe_rows(state, graph, pins) == recipe_rows(state, graph, "[]")


def test_the_feature_tab_reads_through_a_lens_where_one_is_at_hand(state: AppState) -> None:
    lens = Lens({LAYER: torch.eye(state.scope.d_model)}, 1)
    own = AppState(state.scope, state.stores, lens=lens)
    page = own.feature_page(LAYER, 7, "german")
    assert page.lens is not None
    shown = effects_panel(page)
    assert "Disposes to say" in shown
    assert "of random directions" in shown
    for other in (own.feature_page(LAYER - 1, 7), state.feature_page(LAYER, 7)):
        assert other.lens is None
        assert "Disposes to say" not in effects_panel(other)
    with pytest.raises(QwenScopeError, match="the lens is for 8 dimensions"):
        AppState(state.scope, lens=Lens({LAYER: torch.eye(8)}, 1))

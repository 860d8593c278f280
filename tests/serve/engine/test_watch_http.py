"""Watches over HTTP: of requests and of the server, what alarms do to an answer, and what Prometheus is told."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases
import http_server
import httpx
import pytest

from qwen_scope.serve import FIELD
from qwen_scope.steer import Intervention

FAR = Intervention.add(layer=2, direction=[3.0 if i % 3 else -4.0 for i in range(128)], amount=1.0)
EVERY = {"name": "every", "features": {"4/0": 0.0, "5/0": 1e6}, "where": "all", "then": "count"}
RECIPE = {
    "version": 1, "name": "far", "model": "qwen3, 6 layers of 128", "group": None, "provenance": "by hand",
    "effect": {}, "interventions": [FAR.to_json()],
}  # fmt: skip


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server that watches every request for itself, with one recipe."""
    folder: Path = tmp_path_factory.mktemp("server")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "far.json").write_text(json.dumps(RECIPE))
    (folder / "watch.json").write_text(json.dumps({"version": 1, "watch": [EVERY]}))
    with (
        http_server.answering(folder, http_server.Kind(watch=folder / "watch.json")) as server,
        httpx.Client(base_url=server.url, timeout=120, headers={"authorization": "Bearer reads"}) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def ids(known: dict[str, Any]) -> list[int]:
    return known["ids"][0]


def complete(http: httpx.Client, ids: list[Any], field: dict[str, Any] | None = None, **rest: Any) -> dict[str, Any]:
    body = {"model": "lab", "prompt": ids, "temperature": 0, "max_tokens": 16, "return_token_ids": True, **rest}
    answer = http.post("/v1/completions", json=body | ({} if field is None else {FIELD: field}))
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def rule(http: httpx.Client, ids: list[int]) -> tuple[dict[str, Any], int]:
    """A watch whose alarm is at one of the first generated tokens but the very first, and the place of that token."""
    found = complete(http, ids, {"read": {"layers": [4], "top": 256, "where": "generated"}})
    layer = found[FIELD]["activations"][0]["layers"]["4"]
    acts = [dict(zip(*row, strict=True)) for row in zip(layer["features"], layer["values"], strict=True)]
    for place in range(3, 12):
        for feature, value in acts[place].items():
            before = max(row.get(feature, 0.0) for row in acts[:place])
            if value > before + 0.05:
                return {"name": "mine", "features": {f"4/{feature}": (value + before) / 2}}, layer["positions"][place]
    raise AssertionError("no feature rises")


def metrics(http: httpx.Client, name: str) -> dict[tuple[str, ...], float]:
    """Of one family, by the values of its labels."""
    text = http.get("/metrics").raise_for_status().text
    rows = re.findall(rf"^{name}{{(.*)}} (\S+)$", text, re.MULTILINE)
    found = [(dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for labels, value in rows]
    order = ("watch", "recipe", "phase", "then")
    return {tuple(labels[by] for by in order if by in labels): value for labels, value in found}


def test_a_mark_says_where_the_rule_held(http: httpx.Client, ids: list[int], rule: tuple[dict, int]) -> None:
    watch, position = rule
    plain, marked = complete(http, ids), complete(http, [ids, ids], {"watch": [watch]})
    assert plain[FIELD] == {"alarms": []}
    assert {tuple(one["token_ids"]) for one in marked["choices"]} == {tuple(plain["choices"][0]["token_ids"])}
    assert [(one["choice"], one["position"], one["watch"], one["then"]) for one in marked[FIELD]["alarms"]] == [
        (0, position, "mine", "mark"), (1, position, "mine", "mark")]  # fmt: skip
    (because,) = marked[FIELD]["alarms"][0]["because"].items()
    assert because[0] in watch["features"]
    assert because[1] > watch["features"][because[0]]
    body = {
        "model": "lab",
        "prompt": ids,
        "temperature": 0,
        "max_tokens": 16,
        "stream": True,
        FIELD: {"watch": [watch]},
    }
    lines = http.post("/v1/completions", json=body).text.split("\n\n")
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert [one[FIELD]["alarms"][0]["position"] for one in events if FIELD in one] == [position]
    assert FIELD in events[-1]


def test_an_alarm_stops_or_switches(http: httpx.Client, ids: list[int], rule: tuple[dict, int]) -> None:
    watch, position = rule
    plain = complete(http, ids)["choices"][0]["token_ids"]
    stopped = complete(http, ids, {"watch": [{**watch, "then": "stop"}]})
    (choice,) = stopped["choices"]
    assert choice["token_ids"][:-1] == plain[: position - len(ids) + 1]
    assert choice["finish_reason"] == "stop"
    assert stopped[FIELD]["alarms"][0]["then"] == "stop"
    there = {**FAR.to_json(), "where": f"{position + 1}-{len(ids) + 14}"}
    wanted = complete(http, ids, {"interventions": [there]})["choices"][0]["token_ids"]
    for given in ({"recipe": "far"}, {"interventions": [FAR.to_json()]}):
        found = complete(http, ids, {"watch": [{**watch, "then": "switch", **given}]})
        assert found["choices"][0]["token_ids"] == wanted != plain


def test_prometheus_is_told_by_watch_recipe_and_phase(
    http: httpx.Client, ids: list[int], rule: tuple[dict, int]
) -> None:
    names = [f"qwen_scope_watch_{name}_total" for name in ("tokens", "firings", "alarms")]
    before = [metrics(http, name) for name in names]
    watch = {**rule[0], "name": "counted"}
    made = len(complete(http, ids, {"watch": [watch]})["choices"][0]["token_ids"])
    complete(http, ids, {"recipe": "far", "watch": [{**watch, "where": "prompt"}]})
    chat = {
        "model": "lab",
        "messages": [{"role": "user", "content": cases.CHATS[0]}],
        "max_tokens": 6,
        "temperature": 0,
    }
    answer = http.post("/v1/chat/completions", json=chat).raise_for_status().json()
    assert answer[FIELD] == {"alarms": []}
    tokens, firings, alarms = (metrics(http, name) for name in names)
    assert tokens["counted", "none", "generated"] == made - 1
    assert tokens["counted", "far", "prompt"] == len(ids)
    assert firings["counted", "none", "generated"] >= alarms["counted", "none", "generated", "mark"] == 1
    grown = {key: value - before[0].get(key, 0) for key, value in tokens.items() if key[0] == "every"}
    assert grown["every", "none", "prompt"] == len(ids) == grown["every", "far", "prompt"]
    assert grown["every", "none", "prompt:user"] > 3
    assert {phase for _, _, phase in grown if phase.startswith("generated:")}


def test_a_wrong_watch_is_refused_in_one_sentence(http: httpx.Client, ids: list[int], rule: tuple[dict, int]) -> None:
    watch = rule[0]
    for field, rest, sentence in (
        ({"watch": [{**watch, "then": "shout"}]}, {}, "no `then` of 'shout'"),
        ({"watch": [{**watch, "features": {"2/1": 1.0}}]}, {}, "layer 2 is not served for reading"),
        ({"watch": [{**watch, "name": "every"}]}, {}, "two watches have the name 'every'"),
        ({"watch": [{**watch, "then": "switch", "recipe": "fra"}]}, {}, "there is no recipe 'fra'"),
        ({"watch": [{**watch, "then": "stop"}]}, {"ignore_eos": True}, "ignore_eos keeps from ending"),
        ({"watch": [{**watch, "then": "stop"}]}, {"min_tokens": 3}, "min_tokens may keep from ending"),
        ({"watch": {}}, {}, "is a list"),
    ):
        body = {"model": "lab", "prompt": ids, "max_tokens": 4, FIELD: field, **rest}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 400, answer.text
        assert sentence in answer.json()["error"]["message"]
        assert "\n" not in answer.json()["error"]["message"]
    complete(http, ids)

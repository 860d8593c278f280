"""A real server over HTTP: the toolkit's tokens and features, streams, recipes, refusals, clients that leave."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cases
import fuzz_http
import http_server
import httpx
import many_http
import memory_probe
import openai
import pytest

from qwen_scope.serve import FIELD

ROOT = Path(__file__).parents[3]
BATCH, LEFT = 80, 200
KEY = {"x-qwen-scope-key": "writes"}
ENDS = (4091, 4092)  # the lab's end of a text, which the toolkit leaves out
RECIPE = {
    "version": 1, "name": "given", "model": "qwen3, 6 layers of 128", "group": None, "provenance": "by hand",
    "effect": {},
    "interventions": [{"hook_point": "layers.4.resid_post", "op": "add", "feature": 17, "amount": 6.0}],
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[http_server.Served]:
    with http_server.answering(tmp_path_factory.mktemp("server"), http_server.Kind(probe=True)) as found:
        yield found


@pytest.fixture(scope="module")
def url(served: http_server.Served) -> str:
    return served.url


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120, headers={"authorization": "Bearer reads"}) as client:
        yield client


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="reads", max_retries=0)


def body_of(ask: Any) -> dict[str, Any]:
    """What a client writes for an ask."""
    return {FIELD: {"interventions": [one.to_json() for one in ask.interventions]}} if ask else {}


def tokens(choice: Any) -> list[int]:
    return [one for one in choice.model_extra["token_ids"] if one not in ENDS]


def test_every_case_at_once_gives_the_toolkit_s_tokens(client: openai.OpenAI, known: dict[str, Any]) -> None:
    plain = [one for one in known["cases"] if one.ask is None or one.ask.phases is None]
    assert len(plain) > 150

    def ask(case: Any) -> bool:
        out = client.completions.create(
            model="lab", prompt=case.ids, temperature=0, max_tokens=cases.NEW,
            extra_body={"return_token_ids": True, **body_of(case.ask)},
        )  # fmt: skip
        return tokens(out.choices[0]) == case.tokens

    with ThreadPoolExecutor(24) as pool:
        right = list(pool.map(ask, plain))
    assert right.count(False) == 0


def test_chats_know_their_phases(client: openai.OpenAI, known: dict[str, Any]) -> None:
    chats = [one for one in known["cases"] if one.ask is not None and one.ask.phases is not None]
    assert len(chats) == 2 * len(cases.PHASES) * len(cases.CHATS)
    for i, case in enumerate(chats):
        out = client.chat.completions.create(
            model="lab", messages=[{"role": "user", "content": cases.CHATS[i % len(cases.CHATS)]}], temperature=0,
            max_tokens=cases.NEW, extra_body={"return_token_ids": True, **body_of(case.ask)},
        )  # fmt: skip
        assert out.model_extra["prompt_token_ids"] == case.ids
        assert tokens(out.choices[0]) == case.tokens, case.name


def test_features_come_with_every_choice(client: openai.OpenAI, known: dict[str, Any]) -> None:
    read = {"layers": [4], "top": 5, "where": "all"}
    out = client.completions.create(
        model="lab", prompt=known["ids"][:3], n=2, temperature=1, max_tokens=5, seed=0,
        extra_body={"return_token_ids": True, FIELD: {"read": read}},
    )  # fmt: skip
    found = out.model_extra[FIELD]["activations"]
    assert [one["choice"] for one in found] == list(range(6)) == [one.index for one in out.choices]
    for one in found:
        layer, features = one["layers"]["4"], known["features"]["4"][one["choice"] // 2]
        length = len(features[0])
        made = len(out.choices[one["choice"]].model_extra["token_ids"])
        assert layer["positions"] == list(range(length + made - 1)), "the last token is not computed"
        for position in range(length):
            assert layer["features"][position] == features[0][position][:5]
            assert layer["values"][position] == pytest.approx(features[1][position][:5], abs=1e-4)


def test_a_stream_ends_with_the_same_activations(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "lab", "messages": [{"role": "user", "content": cases.CHATS[0]}], "temperature": 0, "max_tokens": 8,
        "extra_body": {FIELD: {"interventions": RECIPE["interventions"],
                               "read": {"layers": [5], "where": "generated"}}},
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    text, events = "", []
    for chunk in client.chat.completions.create(**asked, stream=True):
        text += "".join(one.delta.content or "" for one in chunk.choices)
        events += [chunk.model_extra[FIELD]] if FIELD in (chunk.model_extra or {}) else []
    assert text == whole.choices[0].message.content
    assert events == [whole.model_extra[FIELD]]
    assert len(events[0]["activations"][0]["layers"]["5"]["positions"]) == 7


def test_recipes_are_written_with_their_key_named_and_deleted(http: httpx.Client, client: openai.OpenAI) -> None:
    where = "/v1/qwen_scope/recipes/loud"
    for headers in ({}, {"x-qwen-scope-key": "reads"}, {"x-qwen-scope-key": ""}):
        assert http.put(where, json=RECIPE, headers=headers).status_code == 403
    assert http.get("/v1/qwen_scope/recipes", headers={"authorization": ""}).status_code == 401
    made = http.put(where, json=RECIPE, headers=KEY)
    assert made.status_code == 200, made.text
    assert http.get(where).json() == {**RECIPE, "name": "loud", "interventions": [
        {**RECIPE["interventions"][0], "unit": "raw", "where": "all"}]}  # fmt: skip
    assert [one["name"] for one in http.get("/v1/qwen_scope/recipes").json()["data"]] == ["loud"]

    def text(**field: Any) -> str:
        out = client.completions.create(
            model="lab", prompt=cases.PROMPTS[0], temperature=0, max_tokens=16, extra_body={FIELD: field}
        )
        return out.choices[0].text

    assert text(recipe="loud") == text(interventions=RECIPE["interventions"]) != text()
    yaml = json.dumps({**RECIPE, "interventions": [{**RECIPE["interventions"][0], "amount": 0.0}]}).encode()
    assert http.put(where, content=yaml, headers={**KEY, "content-type": "application/yaml"}).status_code == 200
    assert text(recipe="loud") == text(), "a new recipe under the name acts at once"
    bad = {**RECIPE, "interventions": [{**RECIPE["interventions"][0], "op": "clamp", "hook_point": "layer3"}]}
    for data in (bad, {**RECIPE, "model": "other"}, {**RECIPE, "version": 9}, [], {"a": 1}):
        answer = http.put(where, json=data, headers=KEY)
        assert (answer.status_code, "\n" in answer.json()["error"]["message"]) == (400, False), answer.text
    for name in ("..%2f..%2fx", ".hidden", "a%2fb", "x" * 300):
        assert http.put(f"/v1/qwen_scope/recipes/{name}", json=RECIPE, headers=KEY).status_code == 400
    assert http.delete(where).status_code == 403
    assert http.delete(where, headers=KEY).json() == {"name": "loud", "deleted": True}
    assert http.delete(where, headers=KEY).status_code == http.get(where).status_code == 404
    with pytest.raises(openai.BadRequestError, match="there is no recipe 'loud'"):
        text(recipe="loud")


def test_elsewhere_the_field_is_refused(http: httpx.Client) -> None:
    for path in ("/v1/responses", "/tokenize", "/v1/embeddings"):
        answer = http.post(path, json={"model": "lab", "input": "x", FIELD: {"recipe": "loud"}})
        assert answer.status_code == 400
        assert "it is served at /v1/completions and /v1/chat/completions" in answer.json()["error"]["message"]


def test_clients_that_leave_take_their_activations_with_them(http: httpx.Client) -> None:
    asked = {"model": "lab", "prompt": cases.PROMPTS[0], "max_tokens": 200, "ignore_eos": True, "stream": True,
             FIELD: {"read": {"layers": [4]}}}  # fmt: skip
    for _ in range(4):
        with http.stream("POST", "/v1/completions", json=asked) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
    until = time.monotonic() + 30
    while (worker := http.get("/v1/qwen_scope/status").json()["workers"][0])["held"]:
        assert time.monotonic() < until, worker
        time.sleep(0.5)


def test_the_examples_of_the_documentation_run(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "serve-http.md").read_text()
    page = page.replace("http://127.0.0.1:8000", url).replace("EMPTY", "reads")
    found = re.findall(r"^```(bash|py)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in found] == ["bash", "py", "py", "bash", "py", "bash"]
    names: dict[str, Any] = {}
    for kind, code in found:
        if kind == "py":
            exec(compile(code, "serve-http.md", "exec"), names)
            said = capsys.readouterr().out
            assert ("678" in said) if "stream = " in code else (said or "watched = " in code)  # there may be no alarm
            continue
        env = os.environ | {"VLLM_API_KEY": "reads", "QWEN_SCOPE_RECIPE_KEY": "writes"}
        out = subprocess.run(["bash", "-e", "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        assert "error" not in out, out
        assert any(word in out for word in ('"activations"', '"alarms"', '"deleted": true')), out


def test_hostile_requests(url: str) -> None:
    fuzz_http.fuzz(url, 100, headers={"authorization": "Bearer reads"})


def test_users_do_not_feel_each_other(url: str, known: dict[str, Any]) -> None:
    answers = {name: [one.tokens for one in known["users"] if one.name == name] for name in cases.USERS}
    for one, other in itertools.combinations(answers.values(), 2):
        assert sum(a != b for a, b in zip(one, other, strict=True)) >= 5, "recipes that change hardly anything"
    with httpx.Client(base_url=url, timeout=120, headers=many_http.HEADERS) as client:
        found = many_http.users(client, known, 100)
    assert found["wrong"] == 0
    assert found["log_probability_apart"] < many_http.NEAR


def test_requests_leave_nothing_of_the_plugin_behind(http: httpx.Client) -> None:
    """After the same requests of every kind twice there are as many objects of the plugin's, and as many bytes."""
    many_http.batch(http, BATCH)
    http.get("/probe/start").raise_for_status()
    many_http.batch(http, BATCH)
    before = http.get("/probe").json()
    many_http.batch(http, BATCH)
    after = http.get("/probe").json()
    http.get("/probe/leak").raise_for_status()
    leaking = http.get("/probe").json()
    assert after["engine"]["objects"]["WorkerState"] == 1
    for process, kind in (("front", "Ask"), ("engine", "Wanted")):
        here, then, leaked = (found[process] for found in (after, before, leaking))
        assert here["objects"] == then["objects"]
        grown = sorted((size - then["by_place"].get(place, 0), place) for place, size in here["by_place"].items())
        # what is replaced since tracing began comes into the count bit by bit: 100 bytes a request, and ever less
        assert here["bytes"] - then["bytes"] < LEFT * BATCH, grown[-10:]
        assert leaked["objects"][kind] == here["objects"].get(kind, 0) + memory_probe.LEAK
        assert leaked["bytes"] - here["bytes"] > LEFT * memory_probe.LEAK

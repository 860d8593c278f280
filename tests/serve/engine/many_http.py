"""Many requests over HTTP: users who must not feel each other, and a server whose memory must not grow.

    tests/serve/run.sh many users 1000 fuzz 1000 memory 2000

One server of the lab is asked for each pair in turn: two users with different recipes and so many requests each, and a
quarter as many without; so many hostile requests; so many requests of every kind after a quarter of them as a warm-up,
which a server without the plugin is asked afterwards as well (it ignores the field). Each prints one line of JSON; the
exit code is 1 if a rule is broken. The rules: no answer has other tokens than the toolkit's, or a log-probability
further than `NEAR` from that of the same request asked alone; the memory that belongs to the server's processes grows
by at most `GROWTH` between the warm-up, which has used all the cache, and the end.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cases
import httpx

HEADERS = {"authorization": "Bearer reads", "x-qwen-scope-key": "writes"}
ENDS = (4091, 4092)  # the lab's end of a text, which the toolkit leaves out
NEAR = 1e-3
GROWTH = 16 * 2**20
CLIENTS = 16
RECIPE = {"version": 1, "model": "qwen3, 6 layers of 128", "group": None, "provenance": "by hand", "effect": {}}


def users(client: httpx.Client, known: Mapping[str, Any], count: int, seed: int = 0) -> dict[str, Any]:
    """Two users' requests and a quarter as many without a recipe, in random order: how many answers were influenced.

    One user names a recipe of the server, the other lists interventions; their prompts are the same.
    """
    by_user = {name: [case for case in known["users"] if case.name == name] for name in cases.USERS}
    first = by_user["first"][0].ask
    made = {**RECIPE, "name": "first", "interventions": [one.to_json() for one in first.interventions]}
    client.put("/v1/qwen_scope/recipes/first", json=made).raise_for_status()

    def ask(case: Any) -> tuple[list[int], list[float]]:
        field = {"recipe": "first"} if case.name == "first" else {}
        if case.name == "second":
            field = {"interventions": [one.to_json() for one in case.ask.interventions]}
        body = {"model": "lab", "prompt": case.ids, "temperature": 0, "max_tokens": cases.NEW, "logprobs": 0,
                "return_token_ids": True, "qwen_scope": field}  # fmt: skip
        (choice,) = client.post("/v1/completions", json=body).raise_for_status().json()["choices"]
        kept = [one not in ENDS for one in choice["token_ids"]]
        values = choice["logprobs"]["token_logprobs"]
        return [[x for x, keep in zip(row, kept, strict=True) if keep] for row in (choice["token_ids"], values)]

    alone = {id(case): ask(case)[1] for one in by_user.values() for case in one}
    draw = random.Random(seed)
    sizes = {"first": count, "second": count, "nobody": count // 4}
    asked = [draw.choice(by_user[name]) for name, size in sizes.items() for _ in range(size)]
    draw.shuffle(asked)
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(ask, asked))
    wrong = sum(tokens != case.tokens for case, (tokens, _) in zip(asked, found, strict=True))
    apart = [
        abs(a - b)
        for case, (_, values) in zip(asked, found, strict=True)
        for a, b in zip(values, alone[id(case)], strict=True)
    ]
    client.delete("/v1/qwen_scope/recipes/first").raise_for_status()
    return {"requests": sizes, "wrong": wrong, "log_probability_apart": max(apart)}


def memory(count: int, plugin: bool) -> dict[str, Any]:
    """What requests of every kind leave behind in a server, with the plugin or without."""
    import http_server

    kind = http_server.Kind(plugin=plugin, cached=16)
    with (
        tempfile.TemporaryDirectory() as folder,
        http_server.answering(Path(folder), kind) as served,
        httpx.Client(base_url=served.url, timeout=120, headers=HEADERS) as client,
    ):
        return left(client, served.pid, count)


def left(client: httpx.Client, pid: int, count: int, seed: int = 0) -> dict[str, Any]:
    """The memory of a server while it answers requests of every kind, each with interventions of its own."""
    warm = count // 4
    bodies = [any_request(random.Random(f"{seed} {i}"), i) for i in range(warm + count)]
    sizes = [(0, private(pid))]
    with ThreadPoolExecutor(CLIENTS) as pool:
        ends = [warm, *(warm + count * part // 4 for part in (1, 2, 3, 4))]
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            list(pool.map(lambda body: send(client, body), bodies[start:end]))
            sizes.append((end, private(pid)))
            print(f"{end}: {sizes[-1][1] / 2**20:.1f} MB", file=sys.stderr, flush=True)
    return {"private_mb": [(end, round(size / 2**20, 1)) for end, size in sizes],
            "growth": sizes[-1][1] - sizes[1][1]}  # fmt: skip


def batch(client: httpx.Client, count: int, seed: int = 0) -> None:
    """The same requests of every kind each time it is called, and an end of which workers have heard."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda i: send(client, any_request(random.Random(f"{seed} {i}"), i)), range(count)))
    until = time.monotonic() + 60
    while True:
        plain = {"model": "lab", "prompt": cases.PROMPTS[0], "max_tokens": 1}
        client.post("/v1/completions", json=plain).raise_for_status()  # a step in which workers hear who has gone
        worker = client.get("/v1/qwen_scope/status").json()["workers"][0]
        if not worker["held"] and not worker["recipes"]:
            return
        assert time.monotonic() < until, worker
        time.sleep(0.5)


def any_request(draw: random.Random, i: int) -> dict[str, Any]:
    """A request of some kind; `leave` marks one whose client goes away after the first event."""
    body = {"model": "lab", "prompt": draw.choice([*cases.PROMPTS, *cases.LONG]), "max_tokens": draw.randint(1, 24),
            "temperature": 0, "stream": draw.random() < 0.5}  # fmt: skip
    at = {"hook_point": f"layers.{draw.choice([2, 4])}.resid_post", "amount": draw.uniform(-5, 5)}
    at["where"] = draw.choice(cases.PLACES)
    kind = i % 10
    if kind == 1:
        body["qwen_scope"] = {
            "interventions": [{**at, "op": "add", "direction": [draw.gauss(0, 1) for _ in range(128)]}]
        }
    elif kind in (2, 3):
        body["qwen_scope"] = {"interventions": [{**at, "op": draw.choice(["clamp", "scale"]), "feature": i % 2048}]}
    elif kind in (4, 5):
        body["qwen_scope"] = {"read": {"layers": [4, 5], "top": 20}}
    elif kind == 6:
        body |= {"qwen_scope": {"read": {"layers": [4]}}, "stream": True, "max_tokens": 60, "ignore_eos": True}
        body["leave"] = True
    elif kind == 7:
        body["qwen_scope"] = {"interventions": [{**at, "op": "add", "feature": 4096 + i}]}
    elif kind in (8, 9):
        watch = {"name": "w", "features": {f"4/{i % 2048}": 0.5, "5/7": draw.uniform(0, 2)}, "times": 2}
        far = {"hook_point": "layers.2.resid_post", "op": "add", "feature": i % 2048, "amount": draw.uniform(-5, 5)}
        watch |= {"then": "switch", "interventions": [far]} if kind == 9 else {"then": "mark", "where": "all"}
        body["qwen_scope"] = {"watch": [watch]}
    return body


def send(client: httpx.Client, body: Mapping[str, Any]) -> None:
    """Ask, and read the answer or leave."""
    data = {key: value for key, value in body.items() if key != "leave"}
    with client.stream("POST", "/v1/completions", json=data) as answer:
        if body.get("leave"):
            next(answer.iter_lines())
        else:
            answer.read()


def private(pid: int) -> int:
    """Bytes that belong to a process and its descendants alone."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found = re.search(r"\) \S (\d+)", path.read_text())
        except OSError:  # it has ended
            continue
        if found is not None:
            parents[int(path.parent.name)] = int(found[1])
    mine = {pid}
    while more := {child for child, parent in parents.items() if parent in mine} - mine:
        mine |= more
    rows = [line for one in mine for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()]
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith("Private_"))


def main(given: Sequence[str]) -> int:
    import fuzz_http
    import http_server

    holds = True
    with (
        tempfile.TemporaryDirectory() as folder,
        http_server.answering(Path(folder)) as served,
        httpx.Client(base_url=served.url, timeout=120, headers=HEADERS) as client,
    ):
        for what, count in zip(given[::2], map(int, given[1::2]), strict=True):
            if what == "fuzz":
                made, good = fuzz_http.fuzz(served.url, count, headers=HEADERS), True
            elif what == "users":
                made = users(client, cases.read(os.environ["QWEN_SCOPE_CASES"]), count)
                good = not made["wrong"] and made["log_probability_apart"] < NEAR
            else:
                made = {"requests": count, **{name: memory(count, name == "with") for name in ("with", "without")}}
                good = made["with"]["growth"] <= GROWTH
            print(json.dumps({"what": what, **made, "holds": good}), flush=True)
            holds &= good
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

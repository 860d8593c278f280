"""Hostile requests over HTTP: each is answered with 400 and one sentence, and the server answers as before afterwards.

`python tests/serve/engine/fuzz_http.py URL [COUNT]` asks a running server of the lab; its key stands in `VLLM_API_KEY`.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

PROMPT = {"model": "lab", "prompt": "[12:30] Anna: ", "max_tokens": 4, "temperature": 0}
ADD: dict[str, Any] = {"hook_point": "layers.4.resid_post", "op": "add", "feature": 17, "amount": 1.0}
NUMBERS = [10**30, -1, 1e308, -1e9, 2**63, 0.5, True, None, "1", [], {}]
NOT_NUMBERS = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000]
NAMES = ["nope", "../../etc/passwd", "", ".", "..", "a/b", "x" * 5000, "\0", "\u202e", 5, None, ["a"], {"a": 1}]


def field(value: Any) -> bytes:
    """A request whose field holds this."""
    return json.dumps({**PROMPT, "qwen_scope": value}).encode()


def one(**changed: Any) -> bytes:
    """A request with one intervention that is wrong."""
    return field({"interventions": [{**ADD, **changed}]})


def direction(numbers: Any) -> bytes:
    """A request that adds a direction."""
    return field({"interventions": [{"hook_point": "layers.4.resid_post", "op": "add", "amount": 1.0,
                                     "direction": numbers}]})  # fmt: skip


def raw(value: Any) -> bytes:
    """A request that writes into `vllm_xargs` by itself."""
    return json.dumps({**PROMPT, "vllm_xargs": {"qwen_scope": value}}).encode()


def hostile(draw: random.Random) -> Iterator[bytes]:
    """Endless bodies, none of which may be answered with a text."""
    deep = "[" * draw.choice([60, 3000]) + "]" * 3000
    kinds: list[Callable[[], bytes]] = [
        lambda: direction([1.0] * draw.choice([0, 1, 2, 127, 129, 4096, 50_000])),
        lambda: direction([draw.choice([1e39, 1e308, -1e200])] * 128),
        lambda: direction([0] * 128),
        lambda: direction(draw.choice([None, "x", {}, [[1] * 128], ["1"] * 128, [True] * 128])),
        lambda: one(amount=12345.5).replace(b"12345.5", draw.choice(NOT_NUMBERS)),
        lambda: one(amount=draw.choice([n for n in NUMBERS if n not in (0.5, -1)])),
        lambda: one(feature=draw.choice([2048, 10**9, *[n for n in NUMBERS if n is not None]])),
        lambda: one(hook_point=draw.choice(["layers.6.resid_post", "layers.4.mlp_out", "layer-1", "4.5", "", 4, None])),
        lambda: one(hook_point="layers.99999999999.resid_post"),
        lambda: one(op=draw.choice(["Add", "explode", "", None, 3, "x" * 10_000])),
        lambda: one(op="clamp", hook_point="layers.3.resid_post"),
        lambda: one(unit=draw.choice(["resid_norm", "max_act", "meter", None, 1])),
        lambda: one(where=draw.choice(["nowhere", "5-2", "", "250-260", "thinking", "9" * 400, None, 7, ["all"]])),
        lambda: one(sae=draw.choice([{"group": "x", "layer": 4, "fingerprint": "00"}, 5, "x", {"group": "x"}])),
        lambda: one(extra=1),
        lambda: field({"recipe": draw.choice([name for name in NAMES if name is not None])}),
        lambda: field({"recipe": "german", "interventions": [ADD]}),
        lambda: field({draw.choice(["receipe", "ticket", "phases", "__class__"]): "x"}),
        lambda: field({"interventions": [ADD] * 300}),
        lambda: field({"interventions": draw.choice([5, "x", {"a": ADD}, [5], ["x"], [[ADD]]])}),
        lambda: field({"interventions": [{**ADD, "op": "clamp"}, {**ADD, "op": "cap"}]}),
        lambda: field({"read": draw.choice([5, [], {}, {"layers": []}, {"layers": [0]}, {"layers": ["4"]}])}),
        lambda: field({"read": {"layers": [4], "top": draw.choice([0, -1, 257, 10**12, 1.5, "3", True])}}),
        lambda: field({"read": {"features": draw.choice([[], ["4"], ["4/99999"], ["x/y"], [4], "4/678", ["0/3"]])}}),
        lambda: field({"read": {"layers": [4], "where": draw.choice(["", "nowhere", 5, "3-1", "900"])}}),
        lambda: field(draw.choice([5, "x", [], None, True, 1e9])),
        lambda: b'{"model":"lab","prompt":"x","qwen_scope":' + deep.encode() + b"}",
        lambda: b'{"model":"lab","prompt":"x","qwen_scope":{"recipe":"german"},"qwen_scope":{}}',
        lambda: b'{"model":"lab","prompt":"x","qwen_scope":{"recipe":"ger',
        lambda: json.dumps({**PROMPT, "qwen_scope": {"recipe": "nope"}}).encode("utf-16"),
        lambda: json.dumps({**PROMPT, "qwen_scope": {"recipe": "german"}, "use_beam_search": True, "n": 2}).encode(),
        lambda: raw(draw.choice([5, "", "{", "[]", "null", '{"recipe":"nope"}', '{"read":5}', "{" * 5000, ["x"]])),
        lambda: raw(json.dumps({"interventions": [{**ADD, "feature": 10**6}]})),
        lambda: raw(json.dumps({"interventions": [ADD], "phases": {"runs": [[1, 1]], "chat": "x", "first": "y"}})),
        lambda: json.dumps({**PROMPT, "vllm_xargs": draw.choice([5, "x", ["qwen_scope"]]),
                            "qwen_scope": {"interventions": [ADD]}}).encode(),
    ]  # fmt: skip
    while True:
        yield draw.choice(kinds)()


def fuzz(url: str, count: int, seed: int = 0, headers: Mapping[str, str] | None = None) -> dict[str, int]:
    """Ask `count` hostile requests, one in a hundred of 10 MB; how many were asked.

    Args:
        headers: of every request, such as a key.

    Raises:
        AssertionError: an answer that is not 400 with one sentence, or other tokens afterwards than before.
    """
    draw = random.Random(seed)
    bodies = hostile(draw)
    with httpx.Client(base_url=url, timeout=120, headers=headers) as client:

        def ask(body: bytes) -> httpx.Response:
            return client.post("/v1/completions", content=body, headers={"content-type": "application/json"})

        good = json.dumps({**PROMPT, "logprobs": 1}).encode()
        steered = field({"interventions": [ADD]})
        before = [ask(body).json()["choices"] for body in (good, steered)]
        for i in range(count):
            body = next(bodies)
            if i % 100 == 50:
                body = field({"recipe": "x" * 10**7})
            answer = ask(body)
            shown = body[:300], answer.status_code, answer.text[:300]
            assert answer.status_code == 400, shown
            message = answer.json()["error"]["message"]
            assert "Traceback" not in message, shown
            assert 0 < len(message) < 1500, shown
            assert "\n" not in message.strip(), shown
        assert [ask(body).json()["choices"] for body in (good, steered)] == before
        (worker,) = client.get("/v1/qwen_scope/status").json()["workers"]
        assert worker["held"] == 0
    return {"asked": count}


if __name__ == "__main__":
    key = {"authorization": f"Bearer {os.environ.get('VLLM_API_KEY', '')}"}
    print(fuzz(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1000, headers=key))

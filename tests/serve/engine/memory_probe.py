"""What a server holds, told by its own processes: loaded into a server under test, beside the plugin.

`GET /probe/start` begins to trace; `GET /probe` answers, for the process that takes requests and for the engine's, how
many objects there are of the plugin's classes, how many tensors, and how many bytes the plugin allocated since.
`GET /probe/leak` lets both forget to forget: whoever measures has to notice it.
"""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import qwen_scope
from qwen_scope.serve import protocol
from qwen_scope.serve.seam_worker import WorkerExtension
from qwen_scope.serve.worker import WorkerState, state_of

OURS = [tracemalloc.Filter(True, f"{Path(qwen_scope.__file__).parent}/*", all_frames=True)]
FRAMES = 4
"""Of the calls that led to an allocation: the plugin also wraps functions of vLLM, far above what they allocate."""

LEAK = 80
"""Requests that are remembered for ever by `/probe/leak`."""

_LEAKED: list[Any] = []


def texts() -> list[str]:
    """Of different requests, as admission gives them to the workers."""
    read = protocol.Read.from_json({"layers": [4], "where": "generated"})
    return [protocol.Ask(read=read, ticket=f"leak {i}").to_text() for i in range(LEAK)]


def start() -> None:
    """Trace from now on."""
    if not tracemalloc.is_tracing():
        tracemalloc.start(FRAMES)


def held() -> dict[str, Any]:
    """Of this process."""
    protocol._parsed.cache_clear()  # the last 32 texts, of which every run leaves others
    gc.collect()
    objects: Counter[str] = Counter()
    for one in gc.get_objects():
        kind = type(one)
        if str(kind.__module__).startswith("qwen_scope"):
            objects[kind.__name__] += 1
        elif issubclass(kind, torch.Tensor):
            objects["Tensor"] += 1
    traced = tracemalloc.take_snapshot().filter_traces(OURS)
    by_place = {" < ".join(map(str, reversed(one.traceback))): one.size for one in traced.statistics("traceback")}
    return {"objects": dict(objects), "bytes": sum(by_place.values()), "by_place": by_place}


def _state(worker: Any) -> WorkerState:
    state = state_of(worker.model_runner.get_model())
    assert state is not None
    return state


class Extension(WorkerExtension):
    """The same of the engine's process, in which the only worker runs."""

    def probe_start(self) -> None:
        start()

    def probe_held(self) -> dict[str, Any]:
        # Runner V1 keeps its last step until the next one begins, or until word of a client who has left comes in.
        _state(self).end()
        return held()

    def probe_leak(self) -> None:
        _LEAKED.extend(map(_state(self).wanted, texts()))


class Middleware:
    """`vllm serve --middleware memory_probe.Middleware`."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/probe"):
            await self.app(scope, receive, send)
            return
        engine = scope["app"].state.engine_client
        if scope["path"] == "/probe/start":
            start()
            await engine.collective_rpc("probe_start")
        if scope["path"] == "/probe/leak":
            _LEAKED.extend(map(protocol.Ask.from_text, texts()))
            await engine.collective_rpc("probe_leak")
        found = {} if scope["path"] != "/probe" else {"front": held()}
        if found:
            (found["engine"],) = await engine.collective_rpc("probe_held")
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(found).encode()})

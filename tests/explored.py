"""What the tests of the web page share: hostile text, two small stores, and the page being served."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from gradio_client import Client

from qwen_scope.explorer import AppState, launch
from qwen_scope.model import LoadedModel
from qwen_scope.scope import Scope, extract
from qwen_scope.text import Corpus

HOSTILE = "<script>window.hit=1</script><img src=x onerror='window.hit=2'> \"q\" ${1} {{x}} `b` \u202eשלום مرحبا 🙂"
GERMAN = ["Wo ist der Bahnhof?", "Guten Morgen, wie geht es dir?", "Der Zug kommt um neun.", HOSTILE]
ENGLISH = ["Where is the station?", "Good morning, how are you?", "The train comes at nine."]
LAYER = 4


def make_stores(scope: Scope, folder: Path) -> dict[str, Path]:
    """Two stores of one layer, by name."""
    loaded = LoadedModel(scope.model, scope.tokenizer, scope.name)
    for name, texts in (("german", GERMAN), ("english", ENGLISH)):
        extract(Corpus(texts, name=name), loaded, {LAYER: scope.saes[LAYER]}, folder / name).close()
    return {name: folder / name for name in ("german", "english")}


@contextmanager
def served(state: AppState, **options: Any) -> Iterator[str]:
    """The address of the page while it is served."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the server's packages, in threads that outlive a test
        page, address = launch(state, block=False, **options)
        try:
            yield address
        finally:
            page.close(verbose=False)
            gc.collect()  # sockets and loops that the server's packages left, while nobody minds


def answer(url: str, endpoint: str, data: Any, timeout: float = 120) -> tuple[str, Any]:
    """The event, `complete` or `error`, and the data that an endpoint answers with."""
    route = f"{url}gradio_api/call/{endpoint}"
    event = httpx.post(route, json={"data": data}, timeout=timeout).raise_for_status().json()["event_id"]
    told = httpx.get(f"{route}/{event}", timeout=timeout).text.splitlines()
    kind, said = next(pair for pair in pairwise(told) if pair[0] in ("event: complete", "event: error"))
    return kind.removeprefix("event: "), json.loads(said.removeprefix("data: "))


@contextmanager
def client_of(url: str, **options: Any) -> Iterator[Client]:
    """Gradio's own client, whose threads and sockets end with the block."""
    made = Client(url, verbose=False, **options)
    try:
        yield made
    finally:
        made.close()

"""A store, a seed corpus and targets of the lab; the lab's writer behind a server that fails in every way there is."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope import FeatureStore, Scope, load_scope
from qwen_scope.lab import default_mixture, documents
from qwen_scope.model import LoadedModel
from qwen_scope.posttrain import LabWriter, SynthesisOptions, Target, listed_targets
from qwen_scope.posttrain.lab_writer import LabHandler, LabServer, completion
from qwen_scope.scope import extract
from qwen_scope.text import Corpus

LAYER, STRENGTH = 5, 0.95
SMALL = SynthesisOptions(want=2, budget=30, tries=3, batch=4, shown=3)


@functools.cache
def scope() -> Scope:
    return load_scope("lab", device="cpu")


def texts(seed: int, n: int) -> list[str]:
    """Short talks of the lab."""
    mixture = replace(default_mixture(), sentences=(1, 2))
    return [found.text for found in documents(seed=seed, n=n, kinds=["talk"], mixture=mixture)]


def corpus(seed: int = 2, n: int = 12) -> Corpus:
    return Corpus([{"text": text} for text in texts(seed, n)], name=f"talks {seed}")


@functools.cache
def folder() -> Path:
    """A store of 60 talks, made once per process; not to be changed."""
    out = Path(tempfile.mkdtemp(prefix="qwen-scope-synthesis-")) / "store"
    loaded = LoadedModel(scope().model, scope().tokenizer, "lab")
    extract(corpus(1, 60), loaded, {LAYER: scope().saes[LAYER]}, out).close()
    return out


@functools.cache
def targets(n: int = 10) -> tuple[Target, ...]:
    """Features that fire strongly in several talks of the store and in none of the seed corpus."""
    with FeatureStore(folder()) as store:
        some = np.argsort(-store.stats(LAYER)["documents"].to_numpy(), kind="stable")[100:1000:40]
        found = listed_targets(store, [(LAYER, int(i)) for i in some], STRENGTH)
    seen = strongest(texts(2, 12))
    return tuple(t for t in found if seen[:, t.feature].max() < 0.9 * t.threshold)[:n]


def strongest(some: list[str]) -> np.ndarray:
    """The largest activation of every feature on each text, one text at a time: `(texts, d_sae)`."""
    out = np.zeros((len(some), scope().saes[LAYER].d_sae), np.float32)
    for i, text in enumerate(some):
        acts = scope().features([text], [LAYER], truncate=True).of(0, LAYER)
        np.maximum.at(out[i], acts.indices.numpy().ravel(), acts.values.numpy().ravel())
    return out


class Failing(LabServer):
    """The lab's server, where the first requests fail, each in one of the ways named; asked again they are answered.

    `seen` counts requests by digest; what `after` holds for a number is called when so many requests have come.
    """

    def __init__(self, failures: tuple[str, ...], error_rate: float = 0.1) -> None:
        super().__init__(LabWriter(error_rate))
        self.RequestHandlerClass = FailingHandler
        self.failures, self.seen, self.lock = failures, Counter[str](), threading.Lock()
        self.left, self.over = list(failures), threading.Event()
        self.after: dict[int, Any] = {}
        self.gone = False


class FailingHandler(LabHandler):
    server: Failing

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body, server = json.loads(raw), self.server
        digest = hashlib.sha256(raw).hexdigest()
        with server.lock:
            server.seen[digest] += 1
            first = server.seen[digest] == 1
            way = server.left.pop(0) if first and server.left else ""
            server.after.pop(sum(server.seen.values()), lambda: None)()
        if server.gone:
            self.reply(503, b"{}")
            return
        whole = completion(body, server.writer.answer(body["messages"]))
        if way == "timeout":
            server.over.wait(60)
            self.close_connection = True
        elif way in ("429", "500"):
            self.reply(int(way), b'{"error": {"message": "not now"}}')
        elif way == "cut-off JSON":
            self.reply(200, whole[: len(whole) // 2])
        elif way == "cut-off connection":
            self.reply(200, whole[: len(whole) // 2], len(whole))
            self.close_connection = True
        elif way == "empty":
            self.reply(200, completion(body, "  \n"))
        elif way == "no text":
            self.reply(200, b'{"choices": [{"message": {"content": null}}]}')
        elif way == "wrong language":
            self.reply(200, completion(body, "Completely different words in one plain language."))
        elif way == "copied":
            self.reply(200, completion(body, re.findall(r"^1\. (.*)$", body["messages"][-1]["content"], re.M)[0]))
        elif way == "refused":
            self.reply(400, b'{"error": {"message": "content policy"}}')
        elif way == "half a surrogate":
            self.reply(200, completion(body, "\ud800"))
        else:
            self.reply(200, whole)


@contextmanager
def failing(*failures: str, error_rate: float = 0.1) -> Iterator[Failing]:
    server = Failing(failures, error_rate)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()

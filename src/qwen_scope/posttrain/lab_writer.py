"""A writer behind an OpenAI-compatible address that knows nothing but the lab's grammar: it runs where no model does.

It understands a prompt only through the texts in it: which documents of the grammar they resemble, and what stands
around the marked tokens. It never sees a feature. It answers the questions of `label` and of `synthesize`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol, final, runtime_checkable

import numpy as np

from qwen_scope import lab
from qwen_scope.errors import check_number

LIBRARY, DRAWN, GRAM, AROUND = 4000, 48, 3, 8
Library = tuple[dict[str, np.ndarray], dict[str, float], list[tuple[str, str | None, str | None]]]
"""Documents the writer has read; drafts it makes of a text; letters of a piece; letters read around a marked token."""

MARK = re.compile(r"<<(.*?)>>(?: (\d+))?")
ITEM = re.compile(r"^\d+\. (.*)$", re.MULTILINE)
Factors = tuple[str, str | None, str | None]


@final
class LabWriter:
    """Answers chat completions from the grammar; the same question has the same answer.

    Args:
        error_rate: the share of texts it gets wrong: it writes something of the corpus at random instead.
        seed: of its errors and of what it writes.
    """

    def __init__(self, error_rate: float = 0.1, seed: int = 0) -> None:
        self.error_rate, self.seed = check_number("error_rate", error_rate, 0, 1), seed
        self.written: dict[str, lab.Document] = {}
        self._lock = threading.Lock()

    def answer(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The answer to a conversation of a system message and a user's."""
        system, user = messages[0]["content"], messages[-1]["content"]
        items = ITEM.findall(user)
        if "NAME:" in system:
            return f"NAME: {self.name(items)}"
        if "relevant" in system:
            return json.dumps([relevance(system, label) for label in items])
        if "active anywhere" in system or "those on which" in system:
            description = next(iter(re.findall(r"described as: (.*)", system)), "")
            return str([int(self.fits(description, item)) for item in items])
        number = int.from_bytes(hashlib.sha256(f"{self.seed}|{system}|{user}".encode()).digest()[:6])
        with self._lock:  # the grammar is Python: threads only wait for each other
            found = self.draft(system, user, items, number)
            self.written[found.text.strip()] = found
        return found.text

    def draft(self, system: str, user: str, items: Sequence[str], number: int) -> lab.Document:
        """A new document."""
        rng = np.random.default_rng(number)
        if rng.random() < self.error_rate or not items:
            return next(lab.documents(seed=number, n=1))
        if "rewrite" in system:
            given = re.split(r"\nText to rewrite, version \d+:\n", user)[-1]
            kind, language, _ = self.factors([given])
            wanted = pieces([given])
            wanted.subtract({piece: 2 * n for piece, n in pieces(items, marked=True).items()})
            return best(drawn(kind, language, None, number), wanted)
        marked = any(MARK.search(item) for item in items)
        shown = items if marked else [items[int(rng.integers(len(items)))]]
        return best(drawn(*self.factors(shown), number), pieces(shown, marked=marked))

    def factors(self, texts: Sequence[str]) -> Factors:
        """Kind, language and register that most of the texts have, as far as texts of the library resemble them."""
        found = Counter(self.nearest(text) for text in texts)
        return max(found, key=lambda one: (found[one], str(one)))

    def name(self, excerpts: Sequence[str]) -> str:
        """A label: factors, and what is marked most."""
        kind, language, register = self.factors(excerpts)
        marked = Counter(token.strip() for text in excerpts for token, _ in MARK.findall(text) if token.strip())
        words = ", ".join(json.dumps(token, ensure_ascii=False) for token, _ in marked.most_common(4))
        return f"{' '.join(filter(None, (register, language, kind)))}; often at {words}"

    def fits(self, label: str, text: str) -> bool:
        """Whether a text has the factors that a label names."""
        return all(factor in label.split(";")[0].split() for factor in self.nearest(text) if factor)

    def nearest(self, text: str) -> Factors:
        """The factors of the documents in the library that share most with a text, rare pieces counting more."""
        index, weights, factors = self.library
        score = np.zeros(len(factors))
        for piece in grams(plain(text)):
            if piece in index:
                score[index[piece]] += weights[piece]
        votes = Counter(factors[i] for i in np.argsort(-score, kind="stable")[:5].tolist())
        return max(votes, key=lambda one: (votes[one], str(one)))

    @property
    def library(self) -> Library:
        """What it has read."""
        return read_library(self.seed + 7919)


@cache
def read_library(seed: int) -> Library:
    """Of documents of the lab: where each piece of text occurs, what it weighs, and the factors of every document."""
    documents = list(lab.documents(seed=seed, n=LIBRARY))
    places: dict[str, list[int]] = {}
    for i, document in enumerate(documents):
        for piece in grams(document.text):
            places.setdefault(piece, []).append(i)
    index = {piece: np.array(some) for piece, some in places.items()}
    weights = {piece: math.log(len(documents) / len(some)) for piece, some in places.items()}
    return index, weights, [(d.kind, d.language, d.register) for d in documents]


def drawn(kind: str, language: str | None, register: str | None, number: int) -> list[lab.Document]:
    """New documents with these factors, from the sentences that training may see."""
    chosen: dict[str, Any] = {"kinds": [kind]}
    chosen |= {"languages": [language]} if language else {}
    chosen |= {"registers": [register]} if register else {}
    return list(lab.documents(seed=number, n=DRAWN, **chosen))


def best(documents: Sequence[lab.Document], wanted: Counter[str]) -> lab.Document:
    """The document that has most of what is wanted."""
    return max(documents, key=lambda document: sum(wanted[piece] for piece in grams(document.text)))


def pieces(texts: Sequence[str], marked: bool = False) -> Counter[str]:
    """In how many of the texts each piece occurs; only around marked tokens if there are any."""
    found: Counter[str] = Counter()
    for text in texts:
        if marked:
            found.update(set().union(*(grams(near) for near in around(text))))
        else:
            found.update(grams(plain(text)))
    return found


def around(text: str) -> list[str]:
    """What stands at and around each marked token, without the marks."""
    out = []
    for match in MARK.finditer(text):
        before, after = plain(text[: match.start()]), plain(text[match.end() :])
        out.append(before[-AROUND:] + match[1] + after[:AROUND])
    return out


def plain(text: str) -> str:
    """A text without marks."""
    return MARK.sub(lambda match: match[1], text).replace(" ⏎ ", "\n")


def grams(text: str) -> set[str]:
    """The pieces of a text: every run of a few letters."""
    return {text[i : i + GRAM] for i in range(len(text) - GRAM + 1)}


def relevance(system: str, label: str) -> float:
    """The share of the concept's words that a label has."""
    concept = next(iter(re.findall(r"The concept: (.*)", system)), "")
    wanted, has = (set(re.findall(r"\w+", text.casefold())) for text in (concept, label))
    return round(len(wanted & has) / max(1, len(wanted)), 2)


@runtime_checkable
class Answering(Protocol):
    """Whoever answers a conversation with a text."""

    def answer(self, messages: Sequence[Mapping[str, str]]) -> str: ...


class LabServer(ThreadingHTTPServer):
    """A writer on a free port of the loopback; it may be asked by several threads at a time."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, writer: Answering) -> None:
        super().__init__(("127.0.0.1", 0), LabHandler)
        self.writer = writer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that did not wait for its answer is no error of the server's."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """The address an endpoint takes."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class LabHandler(BaseHTTPRequestHandler):
    """One request for a chat completion."""

    server: LabServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def do_POST(self) -> None:
        """Answer as OpenAI's protocol says."""
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self.reply(200, completion(body, self.server.writer.answer(body["messages"])))

    def reply(self, status: int, data: bytes, length: int | None = None) -> None:
        """Send a reply."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)


def completion(body: Mapping[str, Any], content: str) -> bytes:
    """A chat completion as bytes; a token is taken for four letters."""
    asked, said = sum(len(message["content"]) for message in body["messages"]) // 4, len(content) // 4
    usage = {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
    message = {"role": "assistant", "content": content}
    reply = {
        "object": "chat.completion",
        "model": body.get("model", ""),
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": usage,
    }
    return json.dumps(reply).encode()


@contextmanager
def serving_writer(writer: Answering) -> Iterator[LabServer]:
    """The writer, answering at `url` until the block ends."""
    server = LabServer(writer)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving_lab(error_rate: float = 0.1, seed: int = 0) -> Iterator[LabServer]:
    """The lab's writer, as `serving_writer` does.

    Args:
        error_rate, seed: as for `LabWriter`.
    """
    writer = LabWriter(error_rate, seed)
    _ = writer.library  # read before the first question, which would wait for it
    with serving_writer(writer) as server:
        yield server

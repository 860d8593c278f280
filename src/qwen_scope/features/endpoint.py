"""A language model behind an OpenAI-compatible address: asked concurrently, within a budget, never twice the same."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_scope.errors import FormatError, InputError, NotFoundError

BASE, MODEL, KEY = "OPENAI_BASE_URL", "OPENAI_MODEL", "OPENAI_API_KEY"
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT = 60.0

Message = Mapping[str, str]


class BudgetSpent(InputError):
    """The requests or tokens that were allowed are used up; what was answered is kept in the cache."""


class CutOff(Exception):
    """A reply that ends too early; the request is sent again."""


@dataclass
class Spent:
    """What was used so far: requests that went out (retries too), tokens as the server counts them, cache hits."""

    requests: int = 0
    tokens: int = 0
    cached: int = 0


@dataclass(frozen=True, eq=False)
class Endpoint:
    """Where to ask and how much.

    Attributes:
        base_url: up to and without `/chat/completions`, such as `http://localhost:8000/v1`.
        model: its name there.
        key: sent as a bearer token; never written anywhere.
        cache: a folder of answers by request; asking again after a stop costs nothing. None keeps none.
        max_requests, max_tokens: the budget; None for no limit. Tokens are known only after an answer, so the last
            requests under way may go beyond.
        concurrency: requests at a time.   tries: per request.   timeout: seconds for one.
        wait: seconds before the second try; doubled each time, unless the server says how long.
        spent: what was used so far.

    Raises:
        InputError: an address that is not http or https, or a number below one.
    """

    base_url: str
    model: str
    key: str | None = field(default=None, repr=False)
    cache: Path | None = None
    max_requests: int | None = None
    max_tokens: int | None = None
    concurrency: int = 8
    tries: int = 5
    timeout: float = 120.0
    wait: float = 1.0
    spent: Spent = field(default_factory=Spent)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise InputError(f"an endpoint is an http address such as http://localhost:8000/v1, not {self.base_url!r}")
        if min(self.concurrency, self.tries) < 1:
            raise InputError("an endpoint takes at least one request at a time and tries each once")

    @classmethod
    def from_environment(cls, **options: Any) -> Endpoint | None:
        """The endpoint that `OPENAI_BASE_URL`, `OPENAI_MODEL` and `OPENAI_API_KEY` name, or None without an address.

        Raises:
            InputError: an address without a model.
        """
        base, model = os.environ.get(BASE), options.pop("model", None) or os.environ.get(MODEL)
        if not base:
            return None
        if not model:
            raise InputError(f"{BASE} is set; name the model to ask in {MODEL}")
        return cls(base, model, os.environ.get(KEY), **options)

    def ask(self, messages: Sequence[Message], **options: Any) -> str:
        """One answer as text.

        Args:
            messages: `{"role", "content"}` each.
            options: more fields of the request, such as `temperature` or `max_tokens`.

        Raises:
            BudgetSpent: nothing more may be asked.   InputError: the server refuses the request or the key.
            NotFoundError: the server can't be reached.   FormatError: it answers something else than a completion.
        """
        body = {"model": self.model, "messages": [dict(message) for message in messages], **options}
        text = json.dumps(body, sort_keys=True)
        kept = None if self.cache is None else self.cache / f"{self._digest(text)}.json"
        if kept is not None and kept.is_file():
            with self.lock:
                self.spent.cached += 1
            return _kept(kept)
        answer = self._send(text)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(f".{threading.get_ident()}.part")
            part.write_text(json.dumps({"request": body, "answer": answer}), encoding="utf-8")
            part.replace(kept)
        return answer

    def ask_many(
        self,
        many: Iterable[Sequence[Message]],
        report: Callable[[int], None] | None = None,
        **options: Any,
    ) -> list[str | None]:
        """Answers in the order asked, `concurrency` at a time; None where the budget ended first.

        Args:
            report: called with the number of answers so far.

        Raises:
            InputError, NotFoundError, FormatError: as in `ask`.
        """

        def one(messages: Sequence[Message]) -> str | None:
            try:
                return self.ask(messages, **options)
            except BudgetSpent:
                return None

        out: list[str | None] = []
        with ThreadPoolExecutor(self.concurrency) as pool:
            for answer in pool.map(one, many):
                out.append(answer)
                if report is not None:
                    report(len(out))
        return out

    def _digest(self, text: str) -> str:
        return hashlib.sha256(f"{self.base_url}\n{text}".encode()).hexdigest()

    def _send(self, text: str) -> str:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        url = self.base_url.rstrip("/") + "/chat/completions"
        problem = ""
        for attempt in range(self.tries):
            self._pay()
            request = urllib.request.Request(url, text.encode(), headers, method="POST")
            pause = min(LONGEST_WAIT, self.wait * 2**attempt * random.uniform(0.75, 1.25))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    return self._read(reply.read())
            except CutOff as cut:
                problem = str(cut)
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
                if error.code not in AGAIN:
                    raise InputError(f"{url} answers {error.code}: {said or error.reason}") from error
                problem = f"{error.code} {said}"
                asked = error.headers.get("Retry-After", "")
                pause = min(LONGEST_WAIT, float(asked)) if asked.replace(".", "", 1).isdigit() else pause
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt + 1 < self.tries:
                time.sleep(pause)
        raise NotFoundError(f"{url} gave no answer in {self.tries} tries; the last time: {problem}")

    def _pay(self) -> None:
        with self.lock:
            if self.max_requests is not None and self.spent.requests >= self.max_requests:
                raise BudgetSpent(f"the budget of {self.max_requests} requests is used up")
            if self.max_tokens is not None and self.spent.tokens >= self.max_tokens:
                raise BudgetSpent(f"the budget of {self.max_tokens} tokens is used up")
            self.spent.requests += 1

    def _read(self, data: bytes) -> str:
        try:
            reply = json.loads(data)
        except ValueError as error:
            raise CutOff(f"a reply that is no whole JSON: {data[:80]!r}") from error
        try:
            answer = reply["choices"][0]["message"]["content"]
            used = (reply.get("usage") or {}).get("total_tokens") or 0
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise FormatError(f"{self.base_url} answers no chat completion: {data[:200]!r}") from error
        if not isinstance(answer, str) or not isinstance(used, int):
            raise FormatError(f"{self.base_url} answers no chat completion: {data[:200]!r}")
        with self.lock:
            self.spent.tokens += used
        return answer


def _kept(path: Path) -> str:
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))["answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} in the cache is damaged; delete it to ask again") from error
    if not isinstance(answer, str):
        raise FormatError(f"{path} in the cache is damaged; delete it to ask again")
    return answer

"""A language model behind an OpenAI-compatible address: asked concurrently, within a budget, never twice the same."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from qwen_scope.errors import FormatError, InputError, NotFoundError, check_count, check_number
from qwen_scope.files import write_text

from .completion import Answer, BadAnswer, read_answer, read_completion, used_tokens
from .threads import Threads
from .wire import Reply, Unreached, Wire, parse_address, without_secrets

BASE, MODEL, KEY = "OPENAI_BASE_URL", "OPENAI_MODEL", "OPENAI_API_KEY"
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
CLOSED = {401, 402, 403, 404, 405, 407, 410}
LONGEST_WAIT = 60.0
PLACE = "/chat/completions"
SHORTEST_SECRET = 4  # shorter ones are no secrets, and masking them would garble a sentence

Message = Mapping[str, str]


class BudgetSpent(InputError):
    """The requests or tokens that were allowed are used up; what was answered is kept in the cache."""


class NoAccess(InputError):
    """The server answers no request: its address, the name of the model or the key is not right."""


class Refused(BadAnswer, InputError):
    """The server refuses this one request, for its content or its length; others it may answer."""


@dataclass
class Spent:
    """What was used so far: requests that went out (retries too), tokens, cache hits, answers that were of no use.

    Tokens are those that the server counts; of an answer without a usable count, one per four bytes both ways.
    """

    requests: int = 0
    tokens: int = 0
    cached: int = 0
    unusable: int = 0


@dataclass(frozen=True, eq=False, repr=False)
class Endpoint:
    """Where to ask and how much.

    Attributes:
        base_url: up to and without `/chat/completions`, such as `http://localhost:8000/v1`.
        model: its name there.
        key: sent as a bearer token, to this host alone; never written anywhere.
        cache: a folder of answers by request; asking again after a stop costs nothing. None keeps none.
        max_requests, max_tokens: the budget; None for no limit. Tokens are known only after an answer, so the last
            requests under way may go beyond.
        concurrency: requests at a time.   tries: per answer.   timeout: seconds for one request, from first to last.
        wait: seconds before the second try; doubled each time, unless the server says how long (up to a minute).
        patience: seconds for one answer with all its tries.
        spent: what was used so far.

    Raises:
        InputError: an address that is not http or https, a key that is no header, or a number that can't be.
    """

    base_url: str
    model: str
    key: str | None = None
    cache: Path | None = None
    max_requests: int | None = None
    max_tokens: int | None = None
    concurrency: int = 8
    tries: int = 5
    timeout: float = 120.0
    wait: float = 1.0
    patience: float = 600.0
    spent: Spent = field(default_factory=Spent)
    lock: threading.Lock = field(default_factory=threading.Lock)
    wire: Wire = field(default_factory=Wire, init=False)
    changes: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        parse_address(self.base_url)
        if self.key is not None:
            object.__setattr__(self, "key", self.key.strip())
            if not re.fullmatch(r"[\x21-\x7e]*", self.key):
                raise InputError(f"the key of an endpoint is printable ASCII without spaces; look at {KEY}")
        for name, most in (("concurrency", 1024), ("tries", 100)):
            check_count(f"{name} of an endpoint", getattr(self, name), 1, most)
        for name in ("timeout", "patience"):
            check_number(f"{name} of an endpoint", getattr(self, name), 1e-3, 86400)
        check_number("wait of an endpoint", self.wait, 0, 3600)

    def __repr__(self) -> str:
        return f"Endpoint({self.shown!r}, {self.model!r})"

    @property
    def shown(self) -> str:
        """The address as it may be shown and written: without password and the values of its query."""
        return without_secrets(parse_address(self.base_url))

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

    def ask(
        self,
        messages: Sequence[Message],
        fits: Callable[[str], bool] | None = None,
        wanted: str = "what was asked for",
        **options: Any,
    ) -> str:
        """One answer as text: parts joined, thoughts left out.

        A server that takes no `max_tokens` gets `max_completion_tokens`, one that takes no `temperature` none; that it
        does is remembered.

        Args:
            messages: `{"role", "content"}` each.
            fits: whether an answer is of use. One that is not, or that was cut off, is asked for once more, with four
                times the `max_tokens` where it was cut off; it is not kept in the cache. None takes any text.
            wanted: what an answer of use has, as an error says it.
            options: more fields of the request, such as `temperature` or `max_tokens`.

        Raises:
            BudgetSpent: nothing more may be asked.   NoAccess: the server refuses the key, the model or the address.
            NotFoundError: it can't be reached.   Refused: it refuses this request.
            BadAnswer: it answers something else than a completion, or one of no use.
            InputError: an answer can't be written to the cache.
        """
        body = {"model": self.model, "messages": [dict(message) for message in messages], **options}
        kept = None if self.cache is None else self.cache / f"{self._digest(body)}.json"
        if kept is not None and kept.is_file() and ((text := _kept(kept)), fits is None or fits(text))[1]:
            with self.lock:
                self.spent.cached += 1
            return text
        text = self._usable(body, fits, wanted)
        if kept is not None:
            write_text(kept, json.dumps({"request": body, "answer": text}))
        return text

    def ask_many(
        self,
        many: Iterable[Sequence[Message]],
        fits: Callable[[int, str], bool] | None = None,
        **options: Any,
    ) -> list[str | BadAnswer | None]:
        """Answers in the order asked, `concurrency` at a time: one of no use as its error, None where the budget ended.

        Args:
            fits: as in `ask`, given the number of the question from 0 on and its answer.

        Raises:
            InputError, NotFoundError: as in `ask`; what has not been asked by then is not asked any more.
        """

        def one(i: int, messages: Sequence[Message]) -> str | BadAnswer | None:
            try:
                return self.ask(messages, None if fits is None else partial(fits, i), **options)
            except BudgetSpent:
                return None
            except BadAnswer as bad:
                return bad

        with Threads(self.concurrency) as threads:
            tasks = [threads.submit(one, i, messages) for i, messages in enumerate(many)]
            return [threads.result(task) for task in tasks]

    def _digest(self, body: Mapping[str, Any]) -> str:
        return hashlib.sha256(f"{self.base_url}\n{json.dumps(body, sort_keys=True)}".encode()).hexdigest()

    def _usable(self, body: Mapping[str, Any], fits: Callable[[str], bool] | None, wanted: str) -> str:
        """An answer of use; where `fits` judges, one that is not is asked for once more."""
        until, answer = time.monotonic() + self.patience, None
        for last in (fits is None, True):
            try:
                answer = self._send(body, until)
                if fits is None:
                    return answer.text
                # Of an answer that was cut off the last line is not whole, and half a name is none.
                text = answer.text.rpartition("\n")[0] if answer.cut else answer.text
                if fits(text):
                    return text
                end_of_it = " and was cut off there" if answer.cut else ""
                raise BadAnswer(f"{self.model} gives not {wanted} but {answer.text!r:.100}{end_of_it}")
            except BadAnswer as bad:
                with self.lock:
                    self.spent.unusable += 1
                if last or isinstance(bad, Refused):
                    raise
            if answer is not None and answer.cut and isinstance(body.get("max_tokens"), int):
                body = {**body, "max_tokens": 4 * body["max_tokens"]}
        raise AssertionError("the last turn returns or raises")

    def _send(self, body: Mapping[str, Any], end: float) -> Answer:
        """One whole answer, in at most `tries` tries before `end`."""
        problem, tried, new = "", 0, frozenset[str]()
        while tried < self.tries and (left := end - time.monotonic()) > 0:
            self._pay()
            pause = min(LONGEST_WAIT, self.wait * 2**tried * random.uniform(0.75, 1.25))
            changes = self.changes | new
            try:
                reply = self._post(_changed(body, changes), min(self.timeout, left))
                if reply.status == 200:
                    answer = self._read(reply, len(json.dumps(body)))
                    self.changes.update(new)
                    return answer
                if more := _asked_to_change(reply, body, changes):
                    new |= more
                    continue
                problem = self._refusal(reply)
                pause = _retry_after(reply.headers.get("retry-after", ""), pause)
            except Unreached as error:
                problem = self._hide(str(error))
            tried += 1
            if tried < self.tries:
                time.sleep(max(0.0, min(pause, end - time.monotonic())))
        how = f"{tried} tries" if tried == self.tries else f"{tried} tries and {self.patience:g} seconds"
        raise NotFoundError(f"{self.shown} gave no answer in {how}; the last time: {problem}")

    def _post(self, body: Mapping[str, Any], seconds: float) -> Reply:
        url = parse_address(self.base_url)
        path, mark, query = url.raw_path.decode("ascii").partition("?")
        place = f"{path.rstrip('/').removesuffix(PLACE)}{PLACE}"
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        elif url.userinfo:
            headers["Authorization"] = f"Basic {_basic(url.userinfo.decode('ascii'))}"
        # The library writes addresses into its log, so that only holds what may be seen.
        target = f"{place}{mark}{query}"
        url = url.copy_with(userinfo=b"", raw_path=place.encode())
        try:
            return self.wire.post(url, target, json.dumps(body, sort_keys=True).encode(), headers, seconds)
        except FormatError as error:
            raise BadAnswer(f"{self.shown}: {self._hide(str(error))}") from error
        except InputError as error:
            raise NoAccess(f"{self.shown}: {self._hide(str(error))}") from error

    def _refusal(self, reply: Reply) -> str:
        """Why a request that may be sent again had no answer.

        Raises:
            NoAccess: no request will have one.   Refused: this one will not.
        """
        code, said = reply.status, self._said(reply.data)
        if 300 <= code < 400:
            target = self._hide(reply.headers.get("location", ""))[:200] or "nowhere"
            raise NoAccess(
                f"{self.shown} sends on to {target} ({code}), and neither texts nor key follow; if that is meant, set"
                f" {BASE} to it"
            )
        if code in CLOSED:
            raise NoAccess(f"{self.shown} answers {code}: {said}")
        if code not in AGAIN:
            raise Refused(f"{self.shown} answers {code}: {said}")
        return f"{code} {said}"

    def _said(self, data: bytes) -> str:
        return " ".join(self._hide(data.decode("utf-8", "replace")).split())[:200] or "nothing more"

    def _read(self, reply: Reply, asked: int) -> Answer:
        """The answer; its tokens are counted whether it is of use or not."""
        used = None
        try:
            data = read_completion(reply.data)
            used = used_tokens(data)
            answer = read_answer(data)
        except BadAnswer as bad:
            raise BadAnswer(self._hide(f"{self.shown} answers {bad}")) from bad
        finally:
            with self.lock:
                self.spent.tokens += used if used is not None else -(-(asked + len(reply.data)) // 4)
        return Answer(self._hide(answer.text), answer.cut, answer.tokens)

    def _hide(self, text: str) -> str:
        """A text without the key and whatever else in the address is secret, in the spellings a server may echo."""
        url = parse_address(self.base_url)
        login = url.userinfo.decode("ascii")
        secrets = {self.key or "", login, unquote(login).partition(":")[2], _basic(login)}
        secrets |= set(url.params.values()) | {url.query.decode("ascii")}
        secrets |= {quote(secret, safe="") for secret in secrets}
        for secret in sorted(secrets, key=len, reverse=True):
            if len(secret) >= SHORTEST_SECRET:
                # A server may escape it in JSON, or in JSON within JSON.
                text = re.sub(r"\\*".join(map(re.escape, secret)), "***", text)
        return text

    def _pay(self) -> None:
        with self.lock:
            if self.max_requests is not None and self.spent.requests >= self.max_requests:
                raise BudgetSpent(f"the budget of {self.max_requests} requests is used up")
            if self.max_tokens is not None and self.spent.tokens >= self.max_tokens:
                raise BudgetSpent(f"the budget of {self.max_tokens} tokens is used up")
            self.spent.requests += 1


def _basic(userinfo: str) -> str:
    return base64.b64encode(unquote(userinfo).encode()).decode("ascii")


def _changed(body: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """A request as a server takes it that has not all of OpenAI's older fields."""
    out = dict(body)
    if "max_tokens" in changes and "max_tokens" in out:
        out["max_completion_tokens"] = out.pop("max_tokens")
    if "temperature" in changes:
        out.pop("temperature", None)
    return out


def _asked_to_change(reply: Reply, body: Mapping[str, Any], changes: Iterable[str]) -> frozenset[str]:
    """The field that a refusal names and that can be sent otherwise, unless it is already."""
    if reply.status not in (400, 422):
        return frozenset()
    said = reply.data.decode("utf-8", "replace")
    if param := re.search(r'"param"\s*:\s*"(\w+)"', said):
        said = param[1]
    open_ = [name for name in ("max_tokens", "temperature") if name in body and name not in changes]
    return frozenset([name for name in open_ if re.search(rf"\b{name}\b", said)][:1])


def _retry_after(text: str, otherwise: float) -> float:
    """The seconds that a server asks for, by number or by date, at most a minute; `otherwise` where it says neither."""
    text = text.strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        return min(LONGEST_WAIT, float(text))
    try:
        date = parsedate_to_datetime(text[:64])
        seconds = (date - datetime.now(UTC)).total_seconds() if date.tzinfo else -1.0
    except (ValueError, TypeError, IndexError, OverflowError):
        return otherwise
    return min(LONGEST_WAIT, seconds) if seconds >= 0 else otherwise


def _kept(path: Path) -> str:
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))["answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} in the cache is damaged; delete it to ask again") from error
    if not isinstance(answer, str):
        raise FormatError(f"{path} in the cache is damaged; delete it to ask again")
    return answer

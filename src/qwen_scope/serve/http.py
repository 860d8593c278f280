"""The body field `qwen_scope`: into vLLM's request, and what was read back out into its answer. An ASGI middleware."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import replace
from typing import Any

from qwen_scope.errors import FormatError, InputError, QwenScopeError, printable

from . import answers
from .phases import chat_kinds
from .protocol import FIELD, Ask
from .seam_front import admission_of, watches
from .vllm_config import tokenizer_of

PATHS = ("/v1/completions", "/v1/chat/completions")
"""Where the field is served; elsewhere it is refused."""

MOST_BYTES = 8 * 10**6
"""Of the body of a request that carries the field."""

DRAIN = 1.0
"""Seconds until a request that a client has left is gone from most engines; what comes later is dropped as well."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Middleware:
    """`vllm serve --middleware qwen_scope.serve.http.Middleware`, as `qwen-scope serve` starts it."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self._dropping: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/") == "/metrics":
            from .metrics import refresh  # Prometheus comes with vLLM

            await refresh(scope["app"].state.engine_client)
        if scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
            await self.app(scope, receive, send)
            return
        body = await _whole(receive)
        if body is None:
            return
        state = scope["app"].state
        marked = scope["path"] in PATHS and len(body) <= MOST_BYTES and watches(state.engine_client.vllm_config)
        if not marked and not _may_hold(body):
            await self.app(scope, _again(body, receive), send)
            return
        try:
            found = await asyncio.to_thread(_asked, scope["path"], body, state.engine_client.vllm_config)
        except QwenScopeError as error:
            await _answer(send, 400, answers.error(f"{FIELD}: {printable(str(error))}"))
            return
        if found is None:
            await self.app(scope, _again(body, receive), send)
            return
        ask, n, body = found
        scope = {**scope, "headers": _sized(scope["headers"], len(body))}
        if not ask.ticket:
            await self.app(scope, _again(body, receive), send)
            return
        answer = _Answer(send, lambda: _taken(state.engine_client, ask, n))
        try:
            await self.app(scope, _again(body, receive), answer.send)
        finally:
            if not answer.taken:  # refused, broken off, or the client has gone
                task = asyncio.ensure_future(_drop(state.engine_client, ask.ticket))
                self._dropping.add(task)
                task.add_done_callback(self._dropping.discard)


class _Answer:
    """Passes an answer on, with activations and alarms in it."""

    def __init__(self, send: Send, take: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self._send, self._take, self.taken = send, take, False
        self._start: Message = {}
        self._parts: list[bytes] = []
        self._chunk: dict[str, Any] = {}

    async def send(self, message: Message) -> None:
        """What the server calls."""
        if message["type"] == "http.response.start":
            self._start = message
            if self._streams or message["status"] != 200:
                await self._send(message)
        elif message["type"] != "http.response.body" or self._start["status"] != 200:
            await self._send(message)
        elif self._streams:
            await self._send({**message, "body": await self._with_event(message.get("body", b""))})
        else:
            await self._collect(message)

    @property
    def _streams(self) -> bool:
        return b"event-stream" in dict(self._start["headers"]).get(b"content-type", b"")

    async def _with_event(self, piece: bytes) -> bytes:
        self._chunk = self._chunk or answers.chunk_of(piece)
        end = answers.DONE.search(piece)
        if end is None or self.taken:
            return piece
        return piece[: end.start()] + answers.event(await self._found(), self._chunk) + piece[end.start() :]

    async def _collect(self, message: Message) -> None:
        self._parts.append(message.get("body", b""))
        if message.get("more_body"):
            return
        body = answers.in_answer(b"".join(self._parts), await self._found())
        await self._send({**self._start, "headers": _sized(self._start["headers"], len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def _found(self) -> dict[str, Any]:
        self.taken = True
        return await self._take()


async def _taken(engine: Any, ask: Ask, n: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if ask.read is not None:
        read = await engine.collective_rpc("qwen_scope_take", args=(ask.ticket,))
        found |= answers.activations(read, n)
    if ask.watch:
        raised = await engine.collective_rpc("qwen_scope_alarms", args=(ask.ticket,))
        found["alarms"] = answers.alarms(raised, n)
    return found


async def _drop(engine: Any, ticket: str) -> None:
    await asyncio.sleep(DRAIN)
    await engine.collective_rpc("qwen_scope_drop", args=(ticket,))


def _may_hold(body: bytes) -> bool:
    """Whether a body may have the field: escaped, or in UTF-16 or UTF-32, its name looks different."""
    return FIELD.encode() in body or b"\\u" in body or b"\0" in body


def _with_field(body: bytes, watched: bool) -> dict[str, Any] | None:
    """A body that has the field, itself or in its `vllm_xargs`, or that the server watches; None for any other.

    Raises:
        FormatError: it is too large or can't be read.
    """
    if len(body) > MOST_BYTES:
        raise FormatError(f"the body has {len(body):,} bytes, of which {MOST_BYTES:,} are read with this field")
    try:
        data = json.loads(body, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the body can't be read as JSON: {error}") from error
    if not isinstance(data, dict):
        return None
    given = data.get("vllm_xargs")
    return data if watched or FIELD in data or (isinstance(given, dict) and FIELD in given) else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a key stand twice, and readers differ in which of the two they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise FormatError(f"the body has the key {twice[:60]!r} twice")
    return found


def _asked(path: str, body: bytes, config: Any) -> tuple[Ask, int, bytes] | None:
    """What a body asks for, how many samples of each prompt, and the body with the field in `vllm_xargs`; None for a
    body without the field.

    Raises:
        QwenScopeError: what cannot be served, in one sentence.
    """
    watched = path in PATHS and watches(config)
    if (data := _with_field(body, watched)) is None:
        return None
    if path not in PATHS:
        raise InputError(f"it is served at {' and '.join(PATHS)}, not at {path}")
    if data.get("use_beam_search"):
        raise InputError("beam search is not served: it moves the end of the prompt; leave use_beam_search away")
    given = data.get("vllm_xargs")
    if given is not None and not isinstance(given, dict):
        raise FormatError("vllm_xargs is an object")
    if FIELD not in data and (not watched or FIELD in (given or {})):
        return Ask(), 1, body  # raw, for those who read nothing: admission has it as it is
    if given and FIELD in given:
        raise InputError("the body and its vllm_xargs both hold it; leave one away")
    ask, admission = Ask.from_body(data.pop(FIELD, {})), admission_of(config)
    told = ask.watch or watched
    if ask.read is not None or told:
        ask = replace(ask, ticket=uuid.uuid4().hex)
    if ask.recipe is not None:  # as it stands now: a request is one recipe from its first token to its last
        interventions = admission.library.read(ask.recipe).interventions
        ask = replace(ask, recipe=None, interventions=interventions, label=ask.recipe if told else "")
    if (ask.by_phase or told) and path == "/v1/chat/completions":
        try:
            ask = replace(ask, phases=chat_kinds(ask, data, tokenizer_of(config)))
        except QwenScopeError:
            if ask.by_phase:
                raise
    if not ask.empty or told:
        data["vllm_xargs"] = {**(given or {}), FIELD: ask.to_text()}
    n = data.get("n")
    n = n if isinstance(n, int) and not isinstance(n, bool) and n > 0 else 1  # of anything else the server complains
    return admission.watched(ask) if watched else ask, n, json.dumps(data).encode()


def _is_json(scope: Message) -> bool:
    kind = dict(scope["headers"]).get(b"content-type", b"application/json").lower()
    return b"json" in kind


async def _whole(receive: Receive) -> bytes | None:
    """The body; None where the client has gone before it was whole."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, and then whatever comes."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


def _sized(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    kept = [(key, value) for key, value in headers if key.lower() not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", str(length).encode())]


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = _sized([(b"content-type", b"application/json")], len(body))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

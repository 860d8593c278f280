"""Activations in the answer: what workers read under a ticket, by choice, in a JSON answer or before a stream ends."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_scope.errors import FormatError

from .protocol import FIELD, canonical
from .readout import LOST

DONE = re.compile(rb"^data: \[DONE\]", re.MULTILINE)
"""The end of a stream: at the beginning of a line, as a text that holds these characters has them within one."""

# vLLM's own names of the requests behind one answer: sample k of prompt i of a completion, sample k of a chat.
_COMPLETION = re.compile(r"(?:(\d+)_)?cmpl-.*-(\d+)-[0-9a-f]+")
_CHAT = re.compile(r"(?:(\d+)_)?chatcmpl-.*-[0-9a-f]+")


def choice_of(request: str, n: int) -> int:
    """The index of the choice that a request of vLLM is, where every prompt has `n` samples.

    Raises:
        FormatError: a name of another form.
    """
    if match := _COMPLETION.fullmatch(request):
        return int(match[2]) * n + int(match[1] or 0)
    if match := _CHAT.fullmatch(request):
        return int(match[1] or 0)
    raise FormatError(f"vLLM names a request {request[:80]!r}, which tells no choice")


def activations(read: Sequence[Mapping[str, Any] | None], n: int) -> dict[str, Any]:
    """`activations`: of every choice its layers, from what each worker gave; ranks of a pipeline hold different layers,
    those of tensor parallelism the same. Where a worker had to let them go, none of them, and `LOST`: why."""
    found: dict[int, dict[str, Any]] = {}
    for rank in read:
        if LOST in (rank or {}):
            return {"activations": [], **(rank or {})}
        for request, layers in (rank or {}).items():
            found.setdefault(choice_of(request, n), {}).update(layers)
    return {"activations": [{"choice": choice, "layers": found[choice]} for choice in sorted(found)]}


def alarms(raised: Sequence[Mapping[str, Any] | None], n: int) -> list[dict[str, Any]]:
    """The alarms of every choice, in order; ranks of tensor parallelism raise the same, of which one is taken."""
    rank = next((one for one in raised if one), {})
    found = [{"choice": choice_of(request, n), **alarm} for request, listed in rank.items() for alarm in listed]
    return sorted(found, key=lambda one: (one["choice"], one["position"], one["watch"]))


def in_answer(body: bytes, found: Mapping[str, Any]) -> bytes:
    """A JSON answer with what was found in it."""
    return json.dumps({**json.loads(body), FIELD: found}, ensure_ascii=False).encode()


def event(found: Mapping[str, Any], chunk: Mapping[str, Any]) -> bytes:
    """The event of a stream that holds what was found: a chunk without choices, named like the one before it."""
    named = {key: chunk[key] for key in ("id", "created", "model", "object") if key in chunk}
    return b"data: " + canonical({**named, "choices": [], FIELD: found}).encode() + b"\n\n"


def chunk_of(piece: bytes) -> dict[str, Any]:
    """The first chunk in a piece of a stream; empty where there is none."""
    for line in piece.split(b"\n"):
        if line.startswith(b"data: {"):
            return json.loads(line[len(b"data: ") :])
    return {}


def error(message: str, status: int = 400) -> bytes:
    """An answer in the form of the server's own errors."""
    kind = {403: "PermissionDeniedError", 404: "NotFoundError"}.get(status, "BadRequestError")
    return json.dumps({"error": {"message": message, "type": kind, "param": FIELD, "code": status}}).encode()

"""The entry point `vllm.endpoint_plugins`: recipes of the server over HTTP, and its status."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response

import qwen_scope
from qwen_scope.errors import InputError, NotFoundError, QwenScopeError, printable

from . import answers
from .library import RECIPE_BYTES, SUFFIX, Library, summary
from .plugin import NAME
from .seam_front import admission_of
from .selftest import self_test_server
from .vllm_config import settings_of

KEY = "QWEN_SCOPE_RECIPE_KEY"
"""The environment variable with the key of writes; without it nothing can be written."""

HEADER = "x-qwen-scope-key"
BASE = "/v1/qwen_scope"


class Plugin:
    """Routes under `/v1/qwen_scope`; reads are as open as the rest of the server, writes have a key of their own."""

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        for path, method, answer in (
            ("/recipes", "GET", self.listed),
            ("/recipes/{name:path}", "GET", self.shown),
            ("/recipes/{name:path}", "PUT", self.written),
            ("/recipes/{name:path}", "DELETE", self.deleted),
            ("/status", "GET", self.status),
        ):
            app.add_api_route(BASE + path, answer, methods=[method], name=f"{NAME} {method} {path}")

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Test the engine before the first request.

        Raises:
            SystemExit: with one sentence, where a change is not felt or a worker is without the plugin.
        """
        if settings_of(engine_client.vllm_config) is None:
            return
        try:
            await self_test_server(engine_client)
        except QwenScopeError as error:
            raise SystemExit(f"qwen-scope: {printable(str(error))}") from error

    async def listed(self, request: Request) -> Response:
        """All recipes."""

        def one(library: Library, name: str) -> dict[str, object]:
            try:
                return summary(name, library.read(name))
            except QwenScopeError as error:  # a file that somebody put there
                return {"name": name, "error": printable(str(error))}

        return await _answered(request, lambda library: {"data": [one(library, name) for name in library.names()]})

    async def shown(self, request: Request, name: str) -> Response:
        """One recipe, as its file."""
        return await _answered(request, lambda library: library.read(name).to_json())

    async def written(self, request: Request, name: str) -> Response:
        """Keep a recipe."""
        if (refused := _refused(request)) is not None:
            return refused
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > RECIPE_BYTES:
                return _problem(InputError(f"a recipe has at most {RECIPE_BYTES:,} bytes"))
            parts.append(part)
        suffix = ".yaml" if "yaml" in request.headers.get("content-type", "") else SUFFIX

        def work(library: Library) -> Any:
            return summary(name, library.write(name, b"".join(parts), suffix))

        return await _answered(request, work, missing=400)  # what is missing is a layer or a feature

    async def deleted(self, request: Request, name: str) -> Response:
        """Forget a recipe."""
        if (refused := _refused(request)) is not None:
            return refused

        def work(library: Library) -> Any:
            library.delete(name)
            return {"name": name, "deleted": True}

        return await _answered(request, work)

    async def status(self, request: Request) -> Response:
        """What is served, and what every worker holds."""
        engine = request.app.state.engine_client
        settings = admission_of(engine.vllm_config).settings.to_json()
        served = {key: settings[key] for key in ("layers", "feature_layers", "read_layers", "rows")}
        workers = await engine.collective_rpc("qwen_scope_status")
        return _json({"version": qwen_scope.__version__, "served": served, "workers": workers})


async def _answered(request: Request, work: Callable[[Library], Any], missing: int = 404) -> Response:
    """What `work` gives of the server's recipes; reading and writing files happens beside the loop."""
    config = request.app.state.engine_client.vllm_config
    try:
        return _json(await asyncio.to_thread(lambda: work(admission_of(config).library)))
    except QwenScopeError as error:
        return _problem(error, missing if isinstance(error, NotFoundError) else 400)


def _refused(request: Request) -> Response | None:
    """The answer to a write without the key."""
    key, given = os.environ.get(KEY, ""), request.headers.get(HEADER, "")
    if not key:
        return _problem(InputError(f"recipes can't be written: the server was started without {KEY}"), 403)
    if not hmac.compare_digest(key.encode(), given.encode()):
        return _problem(InputError(f"recipes are written with the server's own key, in the header {HEADER}"), 403)
    return None


def _problem(error: QwenScopeError, status: int = 400) -> Response:
    return Response(answers.error(printable(str(error)), status), status, media_type="application/json")


def _json(data: Any) -> Response:
    return Response(json.dumps(data, ensure_ascii=False), media_type="application/json")

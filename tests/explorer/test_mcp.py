"""`explore --mcp`: a client of the Model Context Protocol lists the endpoints as tools, and asks one."""

from __future__ import annotations

import ast
import asyncio
from typing import Any

import pytest
from explored import LAYER, served

from qwen_scope import load_scope
from qwen_scope.explorer import AppState


@pytest.mark.slow
def test_a_client_lists_tools_and_asks_one() -> None:
    pytest.importorskip("mcp")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def asked(url: str) -> tuple[set[str], Any]:
        async with (
            streamablehttp_client(f"{url.rstrip('/')}/gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as client,
        ):
            await client.initialize()
            tools = {one.name: one for one in (await client.list_tools()).tools}
            name = next(name for name in tools if name.endswith("features"))
            assert "strongest features" in (tools[name].description or "")
            assert {"text", "layer"} <= tools[name].inputSchema["properties"].keys()
            answer = await client.call_tool(name, {"text": "Wo ist der Markt?", "layer": LAYER, "n": 3})
            assert not answer.isError, answer
            return set(tools), ast.literal_eval(answer.content[0].text)  # as Gradio writes it

    scope = load_scope("lab", device="cpu")
    with served(AppState(scope, {}), mcp=True) as url:
        names, found = asyncio.run(asked(url))
    for wanted in ("info", "features", "compare", "feature", "steer", "sweep", "analyze"):
        assert any(name.endswith(wanted) for name in names), (wanted, names)
    seen = scope.features("Wo ist der Markt?", LAYER)
    first = found["tokens"][0]["features"][0]
    assert first[0] == int(seen.of(0, LAYER).indices[0, 0])

"""`qwen-scope explore`: the web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen_scope.errors import InputError, need

from . import options, output, whose


def explore(
    model: options.Model = "lab",
    sae: options.Sae = None,
    stores: Annotated[
        list[Path] | None, typer.Option("--store", help="A folder that extract has written; may be repeated.")
    ] = None,
    lens: Annotated[Path | None, typer.Option("--lens", help="A Jacobian lens (lens fit) for the Feature tab.")] = None,
    host: Annotated[
        str, typer.Option("--host", help="Where to listen; as it is, the page can be reached from this machine only.")
    ] = ("127.0.0.1"),
    port: Annotated[int | None, typer.Option("--port", help="Default: the first free one from 7860 on.")] = None,
    auth: Annotated[
        list[str] | None, typer.Option("--auth", help="NAME:PASSWORD that may enter; may be repeated.")
    ] = None,
    allow_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", help="A further name the page is served under, as behind a proxy; may be repeated."
        ),
    ] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option("--limit", help="What a visitor may ask for, as NAME=NUMBER; may be repeated. docs/explorer.md"),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = False,
    mcp: Annotated[
        bool, typer.Option("--mcp", help="Also serve the HTTP API as tools of the Model Context Protocol.")
    ] = False,
    sae_cache: Annotated[str, typer.Option("--sae-cache", help="Memory for SAEs, such as 8GB.")] = "8GB",
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    k: options.K = None,
) -> None:
    """Open the explorer: a web page to read texts, compare them, steer, and look at features and stores.

    The page can reach the model, the SAEs and the stores named here, and no other file of this machine.
    """
    named = store_names(stores or [])
    pairs = [name_and_password(text) for text in auth or []]
    cache_bytes = options.parse_size(sae_cache)
    need_gradio()
    if mcp:
        need("--mcp", "mcp")
    from qwen_scope.explorer import AppState, Limits, check_host, launch
    from qwen_scope.features import load_lens
    from qwen_scope.scope import load_scope

    allowed, bounds = [check_host(name) for name in allow_hosts or []], Limits.of(limits or [])
    through = None if lens is None else load_lens(lens)
    options.quiet()
    whose.refuse_other_saes(sae)
    with output.status("opening the model"):
        scope = load_scope(model, sae, device=device, dtype=dtype, k=k, cache_bytes=cache_bytes)
        state = AppState(scope, named, bounds, lens=through)
        state.warm()
    whose.say_whose()
    page, url = launch(
        state, host=host, port=port, auth=pairs, allow_hosts=allowed, open_browser=browser, block=False, mcp=mcp
    )
    output.console().print(f"The explorer is at {url} (stop it with Ctrl-C)", soft_wrap=True)
    if mcp:
        output.console().print(f"Its tools for MCP clients are at {url.rstrip('/')}/gradio_api/mcp/", soft_wrap=True)
    page.block_thread()


def need_gradio() -> None:
    """Refuse to go on without Gradio, which only the extra brings."""
    need("the explorer", "gradio")


def store_names(folders: list[Path]) -> dict[str, Path]:
    """The stores by the names of their folders.

    Raises:
        InputError: two of the same name.
    """
    named: dict[str, Path] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in named:
            raise InputError(f"two stores are named {name!r}; rename one of the folders")
        named[name] = folder.resolve()
    return named


def name_and_password(text: str) -> tuple[str, str]:
    """`NAME:PASSWORD` as a pair; raises InputError for anything else."""
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise InputError("--auth is NAME:PASSWORD, neither of them empty")
    return name, password

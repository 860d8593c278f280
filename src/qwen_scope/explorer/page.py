"""The page: a header, the tabs, and how they are served."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.resources import files
from typing import Any

import gradio as gr
from gradio.block_function import BlockFunction
from starlette.middleware import Middleware

from qwen_scope.errors import InputError, printable
from qwen_scope.report import Markup, element, join

from .access.fair_queue import take_turns, waiting
from .access.fits import check_gradio
from .access.gate import Gate, check_host
from .api import Api
from .app_state import AppState
from .look import theme
from .tabs.chat import ChatTab
from .tabs.compare import CompareTab
from .tabs.datasets import DatasetsTab
from .tabs.explore import READING, ExploreTab
from .tabs.feature import OPENING, FeatureTab
from .tabs.steer import SteerTab
from .tabs.why import WhyTab
from .wiring import LOOK, panel, router, told

TITLE = "qwen-scope explorer"
WHAT = (
    "A feature is a direction that the SAE has learnt at one layer; its activation says how much of it a token's"
    " residual holds."
)
EVERYWHERE = ("0.0.0.0", "::", "")
SLICE = 0.0005
"""Seconds that a thread of pure Python, such as a recipe being read, keeps the others waiting. At Python's own 5 ms a
short request, which gives the interpreter away at each of its hundreds of steps, takes seconds beside one."""

WAITING = 200
"""Requests that wait in all queues together."""


class Page(gr.Blocks):
    """Gradio's page, whose endpoints fill in the arguments at the end that a caller leaves out."""

    def validate_inputs(self, block_fn: BlockFunction, inputs: list[Any]) -> None:
        """Append the defaults of what is missing; too few or too many arguments end with a sentence."""
        if block_fn.api_visibility != "private" and block_fn.fn is not None:
            name, takes = block_fn.api_name, list(inspect.signature(block_fn.fn).parameters.values())
            if len(inputs) > len(takes):
                raise gr.Error(f"/{name} takes {len(takes)} arguments, not {len(inputs)}", print_exception=False)
            for missing in takes[len(inputs) :]:
                if missing.default is inspect.Parameter.empty:
                    order = ", ".join(one.name for one in takes)
                    raise gr.Error(
                        f"/{name} needs {missing.name}; it takes {order}, in this order", print_exception=False
                    )
                inputs.append(missing.default)
        super().validate_inputs(block_fn, inputs)


def build(state: AppState) -> gr.Blocks:
    """The page for this state, ready to be launched or mounted."""
    with Page(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as page:
        Api(state).join(page)  # first, so that the endpoints get their plain names
        panel(header(state), elem_id="qs-header")
        pair = panel(pair_lines(state), elem_id="qs-pair")
        page.load(
            lambda: pair_lines(state), None, [pair], api_visibility="private", queue=False, show_progress="hidden"
        )  # of layers that were opened since the page was built, too
        with gr.Tabs(elem_id="qs-tabs"):
            with gr.Tab("Explore", id="explore"):
                explore = ExploreTab(state)
            with gr.Tab("Compare", id="compare"):
                CompareTab(state)
            with gr.Tab("Steer", id="steer"):
                steer = SteerTab(state)
            with gr.Tab("Chat", id="chat"):
                ChatTab(state, steer)
            with gr.Tab("Why", id="why"):
                why = WhyTab(state)
            with gr.Tab("Feature", id="feature"):
                feature = FeatureTab(state)
            with gr.Tab("Datasets", id="datasets"):
                DatasetsTab(state)
        why.join(steer)
        feature.join(router(), steer, why)
        arrive(page, explore, feature)
    return page


def arrive(page: gr.Blocks, explore: ExploreTab, feature: FeatureTab) -> None:
    """What a link shows: `?layer=3&feature=42` a feature's page, `?layer=3&text=Hello` a text.

    The browser opens the tab (`page.js`), at once; an answer never does, since the visitor may be elsewhere by then.
    """

    def opened(request: gr.Request) -> Iterator[dict[Any, Any]]:
        asked = request.query_params
        if "text" in asked:
            read = told(explore.arrive, explore.notice, explore.state, READING)
            layer = asked.get("layer", explore.state.layers[len(explore.state.layers) // 2])
            yield from read(asked["text"], asked.get("chat", "plain"), layer)
        elif "feature" in asked or "layer" in asked:
            look = told(feature.arrive, feature.notice, feature.state, OPENING)
            yield from look(asked.get("layer", ""), asked.get("feature", ""))
        else:
            yield {explore.notice: gr.skip()}

    shown = [*explore.fields, explore.notice, *explore.shown, feature.notice, *feature.shown]
    page.load(
        opened, None, shown, api_visibility="private", show_progress="hidden",
        concurrency_id=LOOK, concurrency_limit=2,
    )  # fmt: skip


def launch(
    state: AppState,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: Sequence[tuple[str, str]] | None = None,
    allow_hosts: Sequence[str] = (),
    open_browser: bool = False,
    block: bool = True,
    mcp: bool = False,
) -> tuple[gr.Blocks, str]:
    """Serve the page, and say where.

    Args:
        host: where to listen; by default only this machine can reach it.
        port: by default the first free one from 7860 on.
        auth: pairs of name and password; without them everybody who reaches the page may use it.
        allow_hosts: names under which the page is served too; see `Gate`.
        block: return only when the page is stopped.
        mcp: also serve the endpoints of the HTTP API as tools of the Model Context Protocol, below `/gradio_api/mcp/`.

    Raises:
        InputError: the address is taken, or none of this machine's; or a host that is none.
        MismatchError: a Gradio that the page does not fit.
    """
    names = [*map(check_host, allow_hosts), *([] if host in EVERYWHERE else [check_host(host)])]
    page = build(state)
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)  # nobody goes past the queue
    check_gradio(page)
    take_turns(page)
    forget_events(page)
    gate = Middleware(Gate, names=names, limits=state.limits, waiting=partial(waiting, page))
    sys.setswitchinterval(SLICE)
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            auth=list(auth) if auth else None,
            inbrowser=open_browser,
            prevent_thread_lock=not block,
            app_kwargs={"middleware": [gate]},
            mcp_server=mcp,
            **served(state),
        )
    except OSError as error:
        place = host if port is None else f"{host}, port {port}"
        raise InputError(f"the page can't listen at {place}, which may be taken; name another --port") from error
    return page, url


def forget_events(page: gr.Blocks) -> None:
    """Have Gradio keep no table of past events, which it would summarise anew after each."""
    page._queue.ANALYTICS_MAX_EVENTS = 1
    page._queue.ANAYLTICS_CACHE_FREQUENCY = 2**62


def served(state: AppState) -> dict[str, Any]:
    """How the page looks and what it lets through, for `Blocks.launch`."""
    here = files("qwen_scope.explorer.look")
    css = theme.variables() + here.joinpath("page.css").read_text(encoding="utf-8")
    script = here.joinpath("page.js").read_text(encoding="utf-8")
    return {
        "theme": theme.theme(),
        "css": css,
        "head": f"<script>{script}</script>",
        "quiet": True,
        "share": False,
        "ssr_mode": False,
        "footer_links": [],
        "enable_monitoring": False,
        "state_session_capacity": state.limits.sessions,
        "max_file_size": state.limits.upload_bytes,
        "allowed_paths": [],
    }


def pair_lines(state: AppState) -> Markup:
    """What is known of whether the SAEs fit the model; empty where nothing is."""
    return join(*(element("p", printable(one[:1].upper() + one[1:]), class_="qs-remarkable") for one in state.pair()))


def header(state: AppState) -> Markup:
    """The name of the page and what it looks at."""
    scope = state.scope
    sae = scope.saes[scope.layers[0]]
    facts = [
        ("model", state.model_name),
        ("SAEs", state.sae_name),
        ("trained from", state.trained_from),
        ("features", f"{sae.d_sae:,} in each of {len(scope.layers)} layers"),
    ]
    shown = [element("span", element("small", name), " ", value) for name, value in facts if value]
    switch = element(
        "button", "◐", type="button", id="qs-theme", title="Light or dark", aria_label="Switch between light and dark"
    )
    top = element(
        "div",
        join(element("h1", "qwen-scope", element("em", "explorer")), element("div", *shown, class_="qs-facts"), switch),
        class_="qs-header",
    )
    return join(top, element("div", element("p", WHAT), legend(), class_="qs-what"))


def legend() -> Markup:
    """What the colours of tokens mean, on every tab."""
    shades = [
        element("span", element("i", class_=f"qs-legend qs-legend-{kind}", aria_hidden="true"), " ", words)
        for kind, words in (
            ("heat", "activation"), ("prob", "probability"), ("changed", "changed by an intervention"),
            ("left-out", "does not count"),
        )
    ]  # fmt: skip
    names = [
        element("span", element("b", "123"), " a label ", element("span", "0.85", class_="qs-score"), " its score"),
        element("span", element("b", "123"), " → tokens it promotes, where there is no label"),
    ]
    return element("div", *shades, *names, class_="qs-key", role="note", aria_label="What colours and names mean")

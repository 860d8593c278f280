"""How the page's parts are joined: panels that report clicks, and handlers whose errors become sentences."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from qwen_scope.errors import QwenScopeError

from .app_state import AppState
from .jobs import Jobs
from .look.components import notice, waiting_panel
from .stages import Waiting, patiently

MODEL = "model"
"""The queue of what runs the model on one text: one at a time, each visitor in turn."""

LOOK = "look"
"""The queue of what looks into a store, or opens a link."""

SETS = "sets"
"""The queue of what runs the model for long: many texts, or many layers. Nobody waits for it to read a text."""

ROUTE = "window.qwenScope.route((data) => trigger('pick', data));"

ATTACH = "window.qwenScope.attach(element, (data) => trigger('pick', data), watch);"


def panel(value: str = "", **options: Any) -> Any:
    """A piece of the page made of markup; a click on anything with `data-pick` triggers its event `pick`."""
    return gr.HTML(value, apply_default_css=False, js_on_load=ATTACH, **options)


def picked(event: gr.EventData, kind: str) -> int:
    """The number in what was picked, such as 5 of `token:5`; -1 if it is of another kind."""
    data = event._data if isinstance(event._data, dict) else {}
    name, _, value = str(data.get("pick", "")).partition(":")
    return int(value) if name == kind and value.isdecimal() and len(value) < 10 else -1


def router() -> Any:
    """What hears of a click on a link to a feature, anywhere on the page: its event `pick`, see `picked_feature`."""
    return gr.HTML("", apply_default_css=False, js_on_load=ROUTE, elem_id="qs-router")


def picked_feature(event: gr.EventData) -> tuple[int, int] | None:
    """The layer and the feature in what was picked, such as 5 and 678 of `open:5/678`; None for anything else."""
    data = event._data if isinstance(event._data, dict) else {}
    kind, _, place = str(data.get("pick", "")).partition(":")
    parts = place.split("/")
    if kind != "open" or len(parts) != 2 or not all(one.isdecimal() and len(one) < 10 for one in parts):
        return None
    return int(parts[0]), int(parts[1])


def told(
    handler: Callable[..., Any], place: gr.HTML, state: AppState, waiting: str | None = None
) -> Callable[..., Any]:
    """The handler, with its purposeful errors shown as sentences at `place`.

    It returns (or yields) a dict of components and values; where it fails, everything else on the page stays.

    Args:
        waiting: what to show at `place`, with a spinner, while it takes long; the handler tells stages by `stage`.
    """
    streams = inspect.isgeneratorfunction(inspect.unwrap(handler))
    if streams or waiting is not None:

        @functools.wraps(handler)
        def stream(*args: Any, **kwargs: Any) -> Iterator[dict[Any, Any]]:
            steps = handler(*args, **kwargs) if streams else (handler(*args, **kwargs) for _ in range(1))
            try:
                for update in steps if waiting is None else patiently(steps, waiting):
                    if isinstance(update, Waiting):
                        yield {place: waiting_panel(update)}
                    else:
                        yield {place: "", **update}
            except QwenScopeError as error:
                yield {place: notice(state.discreet(str(error)))}

        return stream

    @functools.wraps(handler)
    def run(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        try:
            return {place: "", **handler(*args, **kwargs)}
        except QwenScopeError as error:
            return {place: notice(state.discreet(str(error)))}

    return run


def on(
    events: Callable[..., Any] | Sequence[Callable[..., Any]],
    handler: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    place: gr.HTML,
    state: AppState,
    *,
    waiting: str | None = None,
    **options: Any,
) -> Any:
    """Join events to a handler of the page, which is no part of the HTTP API; the last of the joints; see `told`."""
    kept = {"queue": True, "show_progress": "hidden", "api_visibility": "private", **options}
    if kept["queue"]:
        kept.setdefault("concurrency_id", MODEL)
        kept.setdefault("concurrency_limit", 1)
    made = told(handler, place, state, waiting)
    listeners = [events] if callable(events) else events
    return [event(made, list(inputs), [*outputs, place], **kept) for event in listeners][-1]


def stops(button: gr.Button, jobs: Jobs) -> None:
    """The button ends at once what its visitor has at work; it waits in no queue."""

    def stop(request: gr.Request) -> None:
        jobs.stop(str(request.session_hash))

    button.click(stop, queue=False, api_visibility="private", show_progress="hidden")

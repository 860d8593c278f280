"""How the page's parts are joined: panels that report clicks, and handlers whose errors become sentences."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from qwen_scope.errors import QwenScopeError

from .app_state import AppState
from .components import notice
from .jobs import Jobs

MODEL = "model"
"""The queue of what runs the model on one text: one at a time, each visitor in turn."""

LOOK = "look"
"""The queue of what looks into a store, or opens a link."""

SETS = "sets"
"""The queue of what runs the model for long: many texts, or many layers. Nobody waits for it to read a text."""

ATTACH = "window.qwenScope.attach(element, (data) => trigger('pick', data), watch);"


def panel(value: str = "", **options: Any) -> Any:
    """A piece of the page made of markup; a click on anything with `data-pick` triggers its event `pick`."""
    return gr.HTML(value, apply_default_css=False, js_on_load=ATTACH, **options)


def picked(event: gr.EventData, kind: str) -> int:
    """The number in what was picked, such as 5 of `token:5`; -1 if it is of another kind."""
    data = event._data if isinstance(event._data, dict) else {}
    name, _, value = str(data.get("pick", "")).partition(":")
    return int(value) if name == kind and value.isdecimal() and len(value) < 10 else -1


def told(handler: Callable[..., Any], place: gr.HTML, state: AppState) -> Callable[..., Any]:
    """The handler, with its purposeful errors shown as sentences at `place`.

    It returns (or yields) a dict of components and values; where it fails, everything else on the page stays.
    """
    if inspect.isgeneratorfunction(inspect.unwrap(handler)):

        @functools.wraps(handler)
        def stream(*args: Any, **kwargs: Any) -> Iterator[dict[Any, Any]]:
            try:
                for update in handler(*args, **kwargs):
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
    **options: Any,
) -> Any:
    """Join events to a handler of the page, which is no part of the HTTP API; the last of the joints."""
    kept = {"queue": True, "show_progress": "hidden", "api_visibility": "private", **options}
    if kept["queue"]:
        kept.setdefault("concurrency_id", MODEL)
        kept.setdefault("concurrency_limit", 1)
    made = told(handler, place, state)
    listeners = [events] if callable(events) else events
    return [event(made, list(inputs), [*outputs, place], **kept) for event in listeners][-1]


def stops(button: gr.Button, jobs: Jobs) -> None:
    """The button ends at once what its visitor has at work; it waits in no queue."""

    def stop(request: gr.Request) -> None:
        jobs.stop(str(request.session_hash))

    button.click(stop, queue=False, api_visibility="private", show_progress="hidden")

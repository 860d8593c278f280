"""What the page takes from inside Gradio, all of it, and whether the installed Gradio has it."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import gradio as gr
from gradio.context import LocalContext
from gradio.queueing import EventQueue

from qwen_scope.errors import MismatchError, install_line

INSIDE = {
    "page": (  # of a `Blocks` whose queue is set up: access/fair_queue.py, api.py, page.py
        "fns",
        "validate_inputs",
        "_queue.create_event_queue_for_fn",
        "_queue.event_queue_per_concurrency_id",
        "_queue.pending_event_ids_session",
        "_queue.pending_messages_per_session",
        "_queue.ANALYTICS_MAX_EVENTS",
        "_queue.ANAYLTICS_CACHE_FREQUENCY",
    ),
    "a queue": ("queue",),  # access/fair_queue.py
    "the context of a call": ("request.get",),  # api.py
    "an event": ("_data",),  # wiring.py
}
"""Names that Gradio does not promise to keep, by what has them."""


def check_gradio(page: gr.Blocks) -> None:
    """Refuse a Gradio that lacks what the page takes from inside it.

    Raises:
        MismatchError: it says which versions fit, and what to type.
    """
    if missing := list(lacking(page)):
        raise MismatchError(
            f"this page does not fit Gradio {gr.__version__}, which lacks {', '.join(missing)}; install one that fits"
            f" with: {install_line('gradio')}"
        )


def lacking(page: gr.Blocks) -> Iterator[str]:
    """The names that are not there."""
    owners: dict[str, Any] = {
        "page": page,
        "a queue": EventQueue("x", 1),
        "the context of a call": LocalContext,
        "an event": gr.EventData(None, None),
    }
    for what, names in INSIDE.items():
        for name in names:
            try:
                attrgetter(name)(owners[what])
            except AttributeError:
                yield f"{name} of {what}"

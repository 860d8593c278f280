"""Where the writer of a synthesis is asked: an endpoint of the environment, or the lab's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_scope.errors import InputError
from qwen_scope.features import Endpoint

from .data import WriterOptions
from .lab_writer import serving_lab

NOTHING = "http://localhost:1/v1"
"""The address of an endpoint that is never asked."""


@contextmanager
def writer_endpoint(wanted: WriterOptions, cache: Path, *, ask: bool = True) -> Iterator[Endpoint]:
    """The endpoint until the block ends, with its answers kept in `cache`.

    Args:
        ask: without it an endpoint that can't be asked is given where none is known.

    Raises:
        InputError: the environment names none.
    """
    limits = {"max_tokens": wanted.max_tokens, "concurrency": wanted.concurrency, "timeout": wanted.timeout}
    if wanted.writer == "lab":
        with serving_lab() as server:
            yield Endpoint(server.url, "lab", cache=cache, **limits)
        return
    found = Endpoint.from_environment(model=wanted.writer, cache=cache, **limits)
    if found is None and ask:
        raise InputError(
            "no language model to ask: set OPENAI_BASE_URL, OPENAI_MODEL and, where it needs one, OPENAI_API_KEY, or"
            " take --writer lab"
        )
    yield found or Endpoint(
        os.environ.get("OPENAI_BASE_URL") or NOTHING, wanted.writer or "none", cache=cache, **limits
    )

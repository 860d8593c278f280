"""Nobody's long work delays another's short request."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from explored import GERMAN, LAYER, answer, served

from qwen_scope.errors import QwenScopeError
from qwen_scope.explorer import AppState, steering

CHANGE = {"layer": LAYER, "feature": 7, "amount": 0.5}
SLOW = r"(?:(?:.|..|...)*)*(?<=\x07)"
NUMBERS = count()


@pytest.fixture(scope="module")
def visitors() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def usual_of(url: str, work: Any = None, least: int = 5, most: int = 12) -> float:
    """The median time in which a short request of another visitor is answered, as long as the work goes on."""
    took = []
    while len(took) < least or (work is not None and not work.done() and len(took) < most):
        started = time.monotonic()
        assert answer(url, "features", [f"Where is the station? {next(NUMBERS)}", LAYER, "plain", 1])[0] == "complete"
        took.append(time.monotonic() - started)
    return statistics.median(took)


@pytest.fixture(scope="module")
def open_page(state: AppState) -> Iterator[tuple[AppState, str, float]]:
    """A page with the limits of a plain start, and how long a short request takes when nobody else asks."""
    own = AppState(state.scope)
    with served(own) as url:
        usual_of(url)
        yield own, url, usual_of(url)


WHERE = "Where is the station, please?"
LONG = {
    "a regular expression without end": (
        "sweep", [["a" * 60 + "!", "Where where where!"], [CHANGE], "regex", SLOW, {"max_new_tokens": 8}, "plain"],
    ),
    "a comparison of many texts": ("compare", [[f"{WHERE} {GERMAN[0]} {i}" for i in range(120)]] * 2),
    "a comparison of long texts": ("compare", [[WHERE * 60] * 6] * 2),
    "a long generation": ("steer", [WHERE, [CHANGE] * 20, {"max_new_tokens": 300}, "plain"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", LONG)
def test_long_work_of_one_visitor_delays_no_other(
    what: str, open_page: tuple[AppState, str, float], visitors: ThreadPoolExecutor
) -> None:
    _, url, quiet = open_page
    work = visitors.submit(answer, url, *LONG[what])
    assert usual_of(url, work) < quiet + 1
    kind, told = work.result()
    if "regular" in what:
        assert (kind, "takes more than 1 s" in told["error"]) == ("error", True)
    else:
        assert kind == "complete"


@pytest.mark.slow
def test_large_recipes_of_one_visitor_delay_no_other(
    open_page: tuple[AppState, str, float], visitors: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """Reading YAML is pure Python, beside which a short request waits for the interpreter at each of its steps."""
    own, url, quiet = open_page
    path = tmp_path / "large.yaml"
    path.write_text("a: [" + ", ".join(["{q: [1, 2, 'x']}"] * 1600) + "]")
    assert 28_000 < path.stat().st_size <= own.limits.recipe_bytes
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            with pytest.raises(QwenScopeError, match="version"):
                steering.rows_of_recipe(own, str(path))

    work = visitors.submit(load)
    try:
        assert usual_of(url, work) < quiet + 1
    finally:
        over.set()
    work.result()

"""A state on the lab with two stores, and its page served to clients."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import explored
import pytest

from qwen_scope import load_scope
from qwen_scope.explorer import AppState, Limits


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return explored.make_stores(load_scope("lab", device="cpu"), tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="session")
def state(stores: dict[str, Path]) -> AppState:
    return AppState(load_scope("lab", device="cpu"), stores, Limits(upload_bytes=20_000, set_texts=5))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gradio and its client leave sockets and event loops to the garbage collector, and ask pandas for old options."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning"))


@pytest.fixture(scope="module", autouse=True)
def left_behind() -> Iterator[None]:
    """What the server's packages leave to the garbage collector goes before the next module's tests begin."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(scope="module")
def url(state: AppState) -> Iterator[str]:
    with explored.served(state) as address:
        yield address

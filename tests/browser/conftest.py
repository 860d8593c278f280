"""The page, served with two stores, and a browser that visits it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import explored
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from qwen_scope import load_scope
from qwen_scope.explorer import AppState

CHROMIUM = shutil.which("chromium")
PATIENCE = 60_000  # milliseconds; a slow machine is not a wrong page

expect.set_options(timeout=PATIENCE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gradio leaves sockets and event loops to the garbage collector, and asks pandas for an option of old."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
        item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))
        item.add_marker(pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning"))


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> AppState:
    scope = load_scope("lab", device="cpu")
    return AppState(scope, explored.make_stores(scope, tmp_path_factory.mktemp("stores")))


@pytest.fixture(scope="session")
def url(state: AppState) -> Iterator[str]:
    with explored.served(state) as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "needs Debian's package chromium; tests/browser/run.sh gets it"
    with sync_playwright() as tools:
        made = tools.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield made
        made.close()


@pytest.fixture
def visit(browser: Browser, url: str) -> Iterator[Callable[..., Page]]:
    """`visit(path)` opens the page as a new visitor; none of them may meet an error or ask another machine."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def open_page(path: str = "", **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: wrong.append(f"script error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else wrong.append(r.url))
        page.goto(url + path)
        expect(page.get_by_role("tab", name="Explore")).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what the tests upload and download."""
    return tmp_path_factory.mktemp("files")

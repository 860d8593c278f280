"""A page that is served, and a browser that looks at it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from qwen_scope import load_scope
from qwen_scope.explorer import Desk, launch

CHROMIUM = shutil.which("chromium")
PATIENCE = 60_000  # milliseconds; a slow machine is not a wrong page

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="session")
def desk() -> Desk:
    return Desk(load_scope("lab", device="cpu"))


@pytest.fixture(scope="session")
def url(desk: Desk) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the server's packages, in threads that outlive a test
        page, address = launch(desk, block=False)
        yield address
        page.close(verbose=False)


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
    """`visit(path)` opens the page as a new visitor; at the end no visitor may have met an error or left for the net."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def open_page(path: str = "", **options: object) -> Page:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)  # pyright: ignore
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: wrong.append(f"script error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else wrong.append(r.url))
        page.goto(url + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []

"""The page of a graph in a real browser, offline: 500 nodes, hover, pin, fold, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from qwen_scope import load_scope
from qwen_scope.circuits import Quantity, WhyOptions, explain, graph_html, read
from qwen_scope.lab import documents


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scope = load_scope("lab", device="cpu")
    text = next(one.text for one in documents(seed=8, n=20) if len(one.text) > 200)
    ids = scope.tokenizer(text)["input_ids"][:48]
    graph = explain(read(scope, ids, Quantity.logit(5)), WhyOptions(nodes=500, node_share=1.0, exact=0))
    assert len(graph.features) == 500
    out = tmp_path_factory.mktemp("why") / "why.html"
    out.write_text(graph_html(graph), encoding="utf-8")
    return out


def opened(browser: Browser, file: Path, scheme: Any) -> tuple[Page, list[str]]:
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1400, "height": 900})
    wrong: list[str] = []
    page.on("console", lambda one: wrong.append(one.text) if one.type in ("error", "warning") else None)
    page.on("pageerror", lambda one: wrong.append(str(one)))
    page.on("request", lambda one: None if one.url.startswith("file:") else wrong.append(one.url))
    page.goto(file.as_uri())
    return page, wrong


@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(22, 22, 22)")])
def test_the_page_works_offline_in_light_and_dark(browser: Browser, file: Path, scheme: str, paper: str) -> None:
    page, wrong = opened(browser, file, scheme)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    page.check("#unfold")
    assert page.locator('[data-node][class~="up"], [data-node][class~="down"]').count() == 501
    assert wrong == []
    page.close()


def test_a_node_tells_what_it_is_and_can_be_pinned_and_unfolded(browser: Browser, file: Path) -> None:
    page, wrong = opened(browser, file, "light")
    folded = page.locator("[data-node]").count()
    node = page.locator("[data-node][aria-label*='to layer']").last
    name = node.get_attribute("aria-label")
    node.hover()
    details = page.locator("#details")
    assert details.locator("h2").first.text_content() == name
    for heading in ("Where it fires", "Takes in", "Sends"):
        assert details.get_by_text(heading, exact=True).count() == 1
    assert details.get_by_text("passed on").count() >= 1
    assert page.locator("path.edge.up, path.edge.down").count() > 0
    node.click()
    page.mouse.move(2, 2)
    assert page.locator(".node.pinned").count() == 1
    details.get_by_role("button", name="unfold").click()
    assert page.locator("[data-node]").count() > folded
    page.get_by_role("button", name="unpin all").click()
    assert page.locator(".node.pinned").count() == 0
    assert wrong == []
    page.close()


def test_a_long_prompt_wraps_and_names_of_layers_stay_in_sight(browser: Browser, file: Path) -> None:
    page, wrong = opened(browser, file, "light")
    page.locator("[data-node][aria-label*='to layer']").last.hover()
    assert page.locator("#details").evaluate("one => one.scrollWidth <= one.clientWidth"), "the prompt is cut off"
    left = page.locator("#picture").evaluate("one => one.scrollLeft")
    assert left > 0, "the answer stands at the right end"
    for name in (page.locator(".names text").first, page.locator(".names text").last):
        box, home = name.bounding_box(), page.locator("#picture").bounding_box()
        assert box, "drawn"
        assert home, "drawn"
        assert home["x"] <= box["x"] < home["x"] + 70
    assert wrong == []
    page.close()

"""The Why tab, as a visitor uses it: the graph in its frame, light and dark, pinned features that go to Steer."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import FrameLocator, Page, expect

from qwen_scope.circuits import Reading
from qwen_scope.explorer import AppState
from qwen_scope.explorer.tabs import why

Visit = Callable[..., Page]
PATIENCE_S = 60


def explained(page: Page, prompt: str = "Guten Morgen, wo ist", token: str = " der", nodes: int = 30) -> FrameLocator:
    page.locator("#why-prompt textarea").fill(prompt)
    page.locator("#why-token input, #why-token textarea").fill(token)
    page.locator("#why-nodes input").fill(str(nodes))
    page.locator("#why-go").click()
    frame = page.frame_locator("#why-graph iframe")
    expect(frame.locator("[data-node]").first).to_be_visible()
    return frame


def test_a_graph_is_drawn_and_a_node_tells_what_it_is(visit: Visit) -> None:
    frame = explained(visit("?tab=why"))
    expect(frame.locator("h1")).to_contain_text("logit of ' der'")
    node = frame.locator("[data-node][aria-label*='to layer']").last
    name = node.get_attribute("aria-label")
    node.hover()
    details = frame.locator("#details")
    expect(details.locator("h2").first).to_have_text(name or "")
    for heading in ("Where it fires", "Takes in", "Sends"):
        expect(details.get_by_text(heading, exact=True)).to_have_count(1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_frame_is_light_or_dark_with_the_page(visit: Visit, scheme: str) -> None:
    page = visit("?tab=why", color_scheme=scheme)
    frame = explained(page)
    shades = {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 22, 22)"}
    other = {"light": "dark", "dark": "light"}[scheme]
    expect(frame.locator("body")).to_have_css("background-color", shades[scheme])
    page.locator("#qs-theme").click()
    expect(frame.locator("body")).to_have_css("background-color", shades[other])


def test_one_click_takes_the_strongest_features_to_steer(visit: Visit, state: AppState) -> None:
    page = visit("?tab=why")
    page.locator("#why-steer").click()
    expect(page.locator("#why-notice [role=alert]")).to_contain_text("press Explain first")
    explained(page)
    page.locator("#why-steer").click()
    expect(page.get_by_role("tab", name="Steer")).to_have_attribute("aria-selected", "true")
    fields = {"token": " der", "position": -1, "method": "gradient", "nodes": 30}
    _, rows = why.recipe_rows(state, why.explained(state, "Guten Morgen, wo ist", "plain", fields), "[]")
    listed = page.locator("#steer-list .qs-choice")
    expect(listed).to_have_count(len(rows))
    expect(listed.first).to_contain_text(f"of feature {rows[0]['feature']}, layer {rows[0]['layer']}")
    page.locator("#steer-run").click()
    expect(page.locator("#steer-steered button.qs-token").first).to_be_visible()


def test_pinned_features_are_those_that_go_to_steer(visit: Visit) -> None:
    page = visit("?tab=why")
    frame = explained(page)
    frame.locator("#unfold").check()
    nodes = frame.locator('[data-node]:not([aria-label*="to layer"])')
    expect(nodes.first).to_be_visible()
    labels: list[str] = nodes.evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    # A feature may be a node at several tokens; two different ones are pinned.
    at = {name: i for i, label in enumerate(labels) if re.fullmatch(r"\d+/\d+", name := label.split(" ")[0])}
    chosen = dict(list(at.items())[:2])
    for i in chosen.values():
        nodes.nth(i).click()
    page.locator("#why-steer").click()
    listed = page.locator("#steer-list .qs-choice")
    expect(listed).to_have_count(2)
    for name in chosen:
        layer, feature = name.split("/")
        expect(listed.filter(has_text=f"of feature {feature}, layer {layer}")).to_have_count(1)


def test_the_page_is_saved_as_it_is_shown(visit: Visit, files: Path) -> None:
    page = visit("?tab=why")
    explained(page)
    with page.expect_download() as waiting:
        page.locator("#why-save").click()
    waiting.value.save_as(files / "why.html")
    text = (files / "why.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "logit of ' der'" in text


def test_what_makes_no_sense_is_told_in_a_sentence(visit: Visit) -> None:
    page = visit("?tab=why")
    said = page.locator("#why-notice [role=alert]")
    page.locator("#why-go").click()
    expect(said).to_contain_text("The prompt is empty")
    page.locator("#why-prompt textarea").fill("Guten Morgen")
    page.locator("#why-token input, #why-token textarea").fill("Donaudampfschiff")
    page.locator("#why-go").click()
    expect(said).to_contain_text("name one token")
    page.locator("#why-token input, #why-token textarea").fill("")
    page.locator("#why-prompt textarea").fill("so " * 300)
    page.locator("#why-go").click()
    expect(said).to_contain_text("makes graphs of up to 256")


def test_a_graph_shows_progress_and_can_be_stopped(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, read = threading.Event(), why.read

    def slowly(*args: Any, **options: Any) -> Reading:
        assert go_on.wait(PATIENCE_S)
        return read(*args, **options)

    page = visit("?tab=why")
    monkeypatch.setattr(why, "read", slowly)
    try:
        page.locator("#why-prompt textarea").fill("Guten Morgen")
        page.locator("#why-go").click()
        shown = page.locator("#why-graph")
        expect(shown.locator("[role=status]")).to_contain_text("reading")
        page.locator("#why-stop").click()
        expect(shown.locator("[role=status]")).to_contain_text("stopping")
    finally:
        go_on.set()
    expect(shown).to_contain_text("The graph was stopped before its end")

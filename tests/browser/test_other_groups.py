"""Every tab with a group of one layer, and with one of scattered layers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import explored
import pytest
from playwright.sync_api import Browser, Page, expect

from qwen_scope import load_scope
from qwen_scope.explorer import AppState
from qwen_scope.scope import model_source

Visit = Callable[..., Page]


@pytest.mark.parametrize("layers", [[2], [1, 4]])
def test_every_tab_works(browser: Browser, tmp_path: Path, layers: list[int]) -> None:
    source = Path(model_source("lab")).parent / "sae"
    for name in ("config.json", *(f"layer{layer}.sae.pt" for layer in layers)):
        shutil.copy(source / name, tmp_path / name)
    state = AppState(load_scope("lab", sae=str(tmp_path), device="cpu"))
    with explored.served(state) as url:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(url)
        page.locator("#explore-text textarea").fill("Guten Morgen")
        page.locator("#explore-read").click()
        expect(page.locator("#explore-heat table")).to_be_visible()
        page.locator("#explore-layer input").click()
        expect(page.get_by_role("option")).to_contain_text([str(layer) for layer in layers])
        page.get_by_role("option").first.click()
        page.locator("#explore-through").click()
        expect(page.locator("#explore-depth table").first.locator("tr")).to_have_count(len(layers))

        page.get_by_role("tab", name="Compare").click()
        page.locator("#compare-examples button").first.click()
        page.locator("#compare-go").click()
        expect(page.locator("#compare-ranking .qs-group")).to_have_count(len(layers))

        page.locator("#compare-ranking a.qs-open").first.click()
        expect(page.locator("#feature-title h2")).to_contain_text(f"layer {layers[0]}")
        page.get_by_role("button", name="Steer with this").click()
        expect(page.locator("#steer-list .qs-choice")).to_contain_text(f"layer {layers[0]}")
        page.locator("#steer-run").click()
        expect(page.locator("#steer-steered button.qs-token").first).to_be_visible()

        page.get_by_role("tab", name="Why").click()
        page.locator("#why-prompt textarea").fill("Guten Morgen, wo ist")
        page.locator("#why-nodes input").fill("10")
        page.locator("#why-go").click()
        expect(page.frame_locator("#why-graph iframe").locator("[data-node]").first).to_be_visible()
        page.close()

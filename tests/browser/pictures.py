"""Takes the screenshots that the README shows: every tab in light and dark, on the lab with two stores.

    PYTHONPATH=tests .venv/bin/python tests/browser/pictures.py

They are written to docs/explorer/ as PNG with a palette. Chromium is needed (tests/browser/run.sh gets it), and a font
with Chinese, Japanese and Korean letters, such as Debian's fonts-noto-cjk.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

from explored import served
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from qwen_scope import load_scope
from qwen_scope.explorer import AppState
from qwen_scope.lab import documents
from qwen_scope.model import LoadedModel
from qwen_scope.scope import Scope, extract
from qwen_scope.text import Corpus

OUT = Path(__file__).parents[2] / "docs" / "explorer"
LANGUAGES = ("de", "fr", "ja", "en")
WIDTH, TALLEST, DOCUMENTS, COLOURS = 1280, 1500, 60, 256


def stores(scope: Scope, folder: Path) -> dict[str, Path]:
    """A store per language, of the layers that the pictures show."""
    loaded = LoadedModel(scope.model, scope.tokenizer, scope.name)
    layers = sorted({scope.layers[-1], AppState(scope).default_intervention()["layer"]})
    for code in LANGUAGES:
        texts = [one.text for one in documents(n=DOCUMENTS, seed=7, languages=[code])]
        extract(Corpus(texts, name=code), loaded, {layer: scope.saes[layer] for layer in layers}, folder / code).close()
    return {code: folder / code for code in LANGUAGES}


def take(page: Page, name: str, scheme: str) -> None:
    """One picture, from the top to at most `TALLEST`."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(600)
    tall = min(TALLEST, page.evaluate("document.documentElement.scrollHeight"))
    shot = page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": tall})
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    small = image.quantize(
        COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    )  # small areas keep theirs
    small.save(OUT / f"{name}-{scheme}.png", optimize=True)


def tabs(page: Page, scheme: str, german: dict) -> None:
    """Every tab, with something in it."""

    def tab(name: str) -> None:
        page.get_by_role("tab", name=name).click()

    page.locator("#explore-text textarea").fill("Could you wait, please? Shut up, you fool!")
    page.locator("#explore-read").click()
    expect(page.locator("#explore-heat table")).to_be_visible()
    page.locator("#explore-through").click()
    expect(page.locator("#explore-depth table")).to_have_count(2)
    take(page, "explore", scheme)

    tab("Compare")
    page.locator("#compare-text-a textarea").fill("Please come at nine, dear colleague.")
    page.locator("#compare-text-b textarea").fill("Come at nine, you idiot.")
    page.locator("#compare-go").click()
    rows = page.locator("#compare-ranking tr[data-shade]")
    expect(rows.first).to_be_visible()
    rows.nth(7).hover()
    take(page, "compare", scheme)

    tab("Steer")
    page.get_by_role("button", name="Strength sweep").click()
    page.locator("#steer-sweep").click()
    expect(page.locator("#steer-doses article").first).to_be_visible()
    page.locator("#steer-amount input").fill("0.8")
    page.locator("#steer-run").click()
    expect(page.locator("#steer-steered button.qs-token").first).to_be_visible()
    page.locator("#steer-steered button.qs-token").nth(1).click()
    expect(page.locator("#steer-candidates table")).to_be_visible()
    take(page, "steer", scheme)

    tab("Chat")
    for turns, (message, on) in enumerate((("Wo ist der Bahnhof?", True), ("Thanks!", False)), 1):
        page.locator("#chat-on input").set_checked(on)
        page.locator("#chat-message textarea").fill(message)
        page.locator("#chat-send").click()
        expect(page.locator("#chat-talk article")).to_have_count(2 * turns)
        expect(page.locator("#chat-talk .qs-act").first).to_be_visible()
    take(page, "chat", scheme)

    page.goto(f"{page.url.split('?')[0]}?layer={german['layer']}&feature={german['feature']}")
    expect(page.locator("#feature-contexts li").first).to_be_visible()
    take(page, "feature", scheme)

    tab("Datasets")
    page.locator("#datasets-go").click()
    expect(page.locator("#datasets-result svg").first).to_be_visible()
    take(page, "datasets", scheme)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    scope = load_scope("lab", device="cpu")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as tools:
        state = AppState(scope, stores(scope, Path(folder)))
        expect.set_options(timeout=180_000)
        with served(state) as url:
            chromium = tools.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for scheme in ("light", "dark"):
                context = chromium.new_context(viewport={"width": WIDTH, "height": 900}, color_scheme=scheme)
                page = context.new_page()
                page.set_default_timeout(180_000)
                page.goto(url)
                tabs(page, scheme, state.default_intervention())
            chromium.close()


if __name__ == "__main__":
    main()

"""What the browser's tests fill the tabs with, and the controls of each."""

from __future__ import annotations

from explored import ENGLISH, GERMAN, LAYER
from playwright.sync_api import Page, expect

from qwen_scope.explorer import AppState

CONTROLS = {
    "explore": ("#explore-text textarea", "#explore-read", "#explore-chat input", "#explore-layer input[type=range]"),
    "compare": ("#compare-text-a textarea", "#compare-text-b textarea", "#compare-go"),
    "steer": ("#steer-prompt textarea", "#steer-feature input", "#steer-amount input", "#steer-run", "#steer-stop"),
    "chat": ("#chat-message textarea", "#chat-on input", "#chat-send", "#chat-stop", "#chat-mode input"),
    "why": ("#why-prompt textarea", "#why-position input", "#why-nodes input", "#why-go", "#why-stop", "#why-steer"),
    "feature": ("#feature-number input", "#feature-open"),
    "datasets": ("#datasets-analysis input", "#datasets-go", "#datasets-stop"),
}


def fill(page: Page, name: str, state: AppState) -> None:
    """Something to look at on a tab."""
    if name == "explore":
        page.locator("#explore-text textarea").fill(" ".join(GERMAN))
        page.locator("#explore-read").click()
        expect(page.locator("#explore-heat table")).to_be_visible()
    elif name == "compare":
        for side, text in zip("ab", (GERMAN[1], ENGLISH[1]), strict=True):
            page.locator(f"#compare-text-{side} textarea").fill(text)
        page.locator("#compare-go").click()
        expect(page.locator("#compare-ranking tr[data-shade]").first).to_be_visible()
    elif name == "steer":
        page.locator("#steer-run").click()
        page.locator("#steer-steered button.qs-token").nth(1).click()
        expect(page.locator("#steer-candidates table")).to_be_visible()
    elif name == "chat":
        page.locator("#chat-message textarea").fill("Wo ist der Bahnhof?")
        page.locator("#chat-send").click()
        expect(page.locator("#chat-talk .qs-act").first).to_be_visible()
    elif name == "why":
        page.locator("#why-prompt textarea").fill("Guten Morgen, wo ist")
        page.locator("#why-go").click()
        expect(page.frame_locator("#why-graph iframe").locator("[data-node]").first).to_be_visible()
    elif name == "feature":
        best = state.scope.features([GERMAN[0]], [LAYER]).strongest(0, LAYER, 1)[0]
        page.locator("#feature-number input").fill(str(best.feature))
        page.locator("#feature-open").click()
        expect(page.locator("#feature-contexts li").first).to_be_visible()
    elif name == "datasets":
        page.locator("#datasets-go").click()
        expect(page.locator("#datasets-result svg").first).to_be_visible()

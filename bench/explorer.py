"""How long a visitor of the explorer waits, in a real browser on the lab; and a feature's page from a large store.

    python bench/explorer.py [--rounds 7] [--activations 10000000]

Needs Debian's chromium (tests/browser/run.sh gets it) and Python's playwright.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import store as made_up
from playwright.sync_api import Browser, Page, sync_playwright
from side_by_side import markdown, write

from qwen_scope import load_scope
from qwen_scope.explorer import AppState, launch
from qwen_scope.scope import Scope
from qwen_scope.store import FeatureStore, LayerInfo, StoreWriter

LAYER = 4
TEXT = "Could you wait, please? Round {i} of the talk about the station, the garden and the letter."


def large_store(scope: Scope, folder: Path, activations: int) -> None:
    """A store of made-up activations that says it was made with the lab's SAE of one layer."""
    sae = scope.saes[LAYER]
    made_up.D_SAE, made_up.K = sae.d_sae, int(sae.k or 40)
    group, fingerprint = sae.identity.group, sae.identity.fingerprint
    hook_point = f"layers.{LAYER}.resid_post"
    made_up.INFO = LayerInfo(LAYER, hook_point, group, fingerprint, sae.d_sae, sae.k, "topk")
    with StoreWriter(folder, "lab", {"activations": activations}, [made_up.INFO]) as writer:
        for number, window in enumerate(made_up.windows(activations // made_up.K, 0, 0)):
            writer.add(window, {"windows": number + 1})
        writer.finish()


def seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def opened(browser: Browser, url: str) -> tuple[Page, float]:
    """The page for a new visitor, and how long it took until it can be used."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.set_default_timeout(120_000)

    def go() -> None:
        page.goto(url)
        page.locator("#explore-text textarea").wait_for()

    return page, seconds(go)


def explored(page: Page, i: int) -> float:
    page.locator("#explore-text textarea").fill(TEXT.format(i=i))
    want = f"#explore-tokens .qs-tokens:has-text('{i} of')"

    def act() -> None:
        page.locator("#explore-read").click()
        page.locator(want).wait_for()

    return seconds(act)


def compared(page: Page, i: int) -> float:
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-text-a textarea").fill(TEXT.format(i=i))
    page.locator("#compare-text-b textarea").fill("Wo ist der Bahnhof? Bitte warten Sie im Garten.")
    want = f"#compare-side-a .qs-tokens:has-text('{i} of')"

    def act() -> None:
        page.locator("#compare-go").click()
        page.locator(want).wait_for()

    return seconds(act)


def steered(page: Page, i: int) -> float:
    """Until the first of the steered text is seen."""
    page.get_by_role("tab", name="Steer").click()
    page.locator("#steer-prompt textarea").fill(f"[12:{10 + i}] Anna: ")
    page.wait_for_timeout(500)  # the preview of the positions is another question
    started = page.evaluate(
        """() => new Promise((done) => {
          const all = (what) => [...document.querySelectorAll(`#steer-steered ${what}`)];
          const text = (what) => all(what).map((e) => e.textContent).join("");
          const before = text("button.qs-token"), from = performance.now();
          const look = () => {
            const now = text("button.qs-token");
            text(".qs-prose") || (now && now !== before)
              ? done((performance.now() - from) / 1000) : requestAnimationFrame(look);
          };
          document.querySelector('#steer-run').click();
          look();
        })"""
    )
    page.locator("#steer-steered button.qs-token").first.wait_for()
    return float(started)


def featured(page: Page, feature: int) -> float:
    """From the click until the page of the feature is drawn, as the browser itself sees it."""
    page.get_by_role("tab", name="Feature").click()
    page.locator("#feature-number input").fill(str(feature))
    took = page.evaluate(
        """(want) => new Promise((done) => {
          const from = performance.now();
          const look = () => {
            const title = document.querySelector("#feature-title h2");
            const there = title?.textContent.startsWith(want) && document.querySelector("#feature-contexts section");
            there ? setTimeout(() => done((performance.now() - from) / 1000)) : requestAnimationFrame(look);
          };
          document.querySelector("#feature-open").click();
          look();
        })""",
        f"Feature {feature}layer",
    )
    page.locator("#feature-near:not(:has-text('counting'))").wait_for()  # what fires with it follows
    return float(took)


def measure(rounds: int, activations: int) -> None:
    """Print the table, and write it into docs/performance.md."""
    scope = load_scope("lab")
    with tempfile.TemporaryDirectory() as folder:
        large_store(scope, Path(folder) / "large", activations)
        state = AppState(scope, {"large": Path(folder) / "large"})
        with FeatureStore(state.stores["large"]) as store:
            busy = np.argsort(-store.stats(LAYER)["tokens"].to_numpy(), kind="stable")
            rows = store.layer(LAYER).activations
        chosen = [int(f) for f in busy[np.linspace(0, len(busy) - 1, rounds).astype(int)]]
        state.feature_page(LAYER, chosen[0], "large")
        gathered = [seconds(lambda f=f: state.feature_page(LAYER, f, "large")) for f in chosen]
        state.warm()
        page, url = launch(state, block=False)
        with sync_playwright() as tools:
            chromium = shutil.which("chromium")
            browser = tools.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            first, *later = [opened(browser, url) for _ in range(max(2, rounds // 2))]
            visitor = first[0]
            visitor.goto(f"{url}?layer={LAYER}&feature={chosen[0]}")
            visitor.locator("#feature-title h2").wait_for()
            shown = [featured(visitor, f) for f in chosen[1:]]
            visitor = later[0][0]
            results = [
                ("first paint, first visitor", 3.0, [first[1]]),
                ("first paint, later visitors", 3.0, [took for _, took in later]),
                ("Explore answers", 1.0, [explored(visitor, i) for i in range(rounds)]),
                ("Compare answers, all layers", 1.0, [compared(visitor, i) for i in range(rounds)]),
                ("steering shows its first text", 1.0, [steered(visitor, i) for i in range(rounds)]),
                (f"a feature's page gathered, store of {rows:,} activations", 0.5, gathered),
                ("the same, click to shown", 0.5, shown),
            ]
            browser.close()
        page.close(verbose=False)
    tell(results)


def tell(results: list[tuple[str, float, list[float]]]) -> None:
    lines = [
        (name, median(took), max(took), limit, "yes" if median(took) < limit else "**no**")
        for name, limit, took in results
    ]
    made = markdown(("what a visitor waits for", "median s", "longest s", "wanted below", "holds"), lines)
    words = "Headless Chromium and the server share the processors; the lab's model."
    print(f"{words}\n\n{made}")
    write("explorer.py", [words, "", made])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--activations", type=int, default=10_000_000)
    given = parser.parse_args()
    measure(given.rounds, given.activations)

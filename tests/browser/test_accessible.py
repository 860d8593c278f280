"""What axe-core finds on every tab with something on it, in light and dark: nothing serious."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from filled import CONTROLS, fill
from playwright.sync_api import Page, expect

from qwen_scope.explorer import AppState

Visit = Callable[..., Page]

AXE = Path(__file__).parents[2] / "out" / "axe" / "package" / "axe.min.js"
RUN = """async () => (await axe.run(document, {iframes: false})).violations
  .filter((one) => ["serious", "critical"].includes(one.impact))
  .map((one) => [one.id, one.nodes.slice(0, 3).map((node) => node.html.slice(0, 200))])"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit: Visit, state: AppState, scheme: str) -> None:
    assert AXE.is_file(), "needs axe-core; tests/browser/run.sh gets it"
    found = {}
    page = visit(color_scheme=scheme)
    page.add_script_tag(path=AXE)
    for name in CONTROLS:
        page.get_by_role("tab", name=name.capitalize(), exact=True).click()
        expect(page.locator(CONTROLS[name][0])).to_be_visible()
        fill(page, name, state)
        page.mouse.move(0, 0)
        page.wait_for_timeout(300)  # colours fade
        if wrong := page.evaluate(RUN):
            found[name] = wrong
    assert found == {}

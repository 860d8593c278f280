"""The Explore tab, as a visitor uses it."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page, expect

from qwen_scope.explorer import Desk

TEXT = "Could you wait, please? Shut up, you fool!"
Visit = Callable[..., Page]


def read(page: Page, text: str = TEXT) -> None:
    page.locator("#explore-text textarea").fill(text)
    page.locator("#explore-read").click()
    expect(page.locator("#explore-heat table")).to_be_visible()


def test_a_text_is_read_and_its_tokens_lead_to_features(visit: Visit, desk: Desk) -> None:
    page = visit()
    read(page)
    layer = int(page.locator("#explore-layer input[type=number]").input_value())
    seen = desk.scope.features([TEXT], [layer])
    chips = page.locator("#explore-tokens button.qs-token")
    assert "".join(chips.all_text_contents()) == "".join(seen.tokens[0])

    best = seen.strongest(0, layer, 1)[0]
    expect(chips.nth(best.position)).to_have_attribute("aria-pressed", "true")
    rows = page.locator("#explore-text-features .qs-row .qs-id")
    assert [int(text) for text in rows.all_text_contents()] == [s.feature for s in seen.strongest(0, layer, 12)]

    chips.nth(3).click()
    expect(chips.nth(3)).to_have_attribute("aria-pressed", "true")
    of_token = page.locator("#explore-token-features .qs-row .qs-id")
    expected = seen.of(0, layer)[3].indices[:12].tolist()
    expect(of_token.first).to_have_text(str(expected[0]))
    assert [int(text) for text in of_token.all_text_contents()] == expected

    of_token.nth(1).click()
    expect(page.locator("#explore-tokens .qs-id")).to_have_text(f"feature {expected[1]}")
    values = seen.of(0, layer).select([expected[1]])[:, 0]
    shaded = [
        i for i, style in enumerate(chips.evaluate_all("c => c.map(x => x.style.getPropertyValue('--v'))")) if style
    ]
    assert shaded == values.nonzero().flatten().tolist()

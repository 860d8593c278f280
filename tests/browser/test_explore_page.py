"""The Explore tab, as a visitor uses it."""

from __future__ import annotations

from collections.abc import Callable

from explored import HOSTILE
from playwright.sync_api import Page, expect

from qwen_scope.explorer import AppState

TEXT = "Could you wait, please? Shut up, you fool!"
Visit = Callable[..., Page]


def read(page: Page, text: str = TEXT) -> int:
    """Read a text; the layer that is shown."""
    page.locator("#explore-text textarea").fill(text)
    page.locator("#explore-read").click()
    expect(page.locator("#explore-heat table")).to_be_visible()
    return int(page.locator("#explore-layer input[type=number]").input_value())


def test_a_text_is_read_and_its_tokens_lead_to_features(visit: Visit, state: AppState) -> None:
    page = visit()
    layer = read(page)
    seen = state.scope.features([TEXT], [layer])
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
    expect(page.locator("#explore-tokens .qs-heading .qs-id")).to_have_text(f"feature {expected[1]}")
    styles = chips.evaluate_all("chips => chips.map(chip => chip.style.getPropertyValue('--v'))")
    values = seen.of(0, layer).select([expected[1]])[:, 0]
    assert [i for i, style in enumerate(styles) if style] == values.nonzero().flatten().tolist()


def test_another_layer_and_the_text_through_depth(visit: Visit, state: AppState) -> None:
    page = visit()
    layer = read(page)
    slider = page.locator("#explore-layer input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    seen = state.scope.features([TEXT], [layer + 1])
    best = seen.strongest(0, layer + 1, 1)[0]
    expect(page.locator("#explore-text-features .qs-row .qs-id").first).to_have_text(str(best.feature))

    page.locator("#explore-through").click()
    depth = page.locator("#explore-depth table")
    expect(depth).to_have_count(2)
    expect(depth.nth(1).locator("tr")).to_have_count(len(state.layers))
    expect(depth.nth(0).locator(".qs-here .qs-id")).to_have_text(str(best.feature))


def test_the_keyboard_reaches_every_token(visit: Visit) -> None:
    page = visit()
    read(page)
    chips = page.locator("#explore-tokens button.qs-token")
    assert chips.evaluate_all("chips => chips.filter(chip => chip.tabIndex === 0).length") == 1
    page.locator("#explore-tokens button.qs-token[tabindex='0']").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(chips.nth(2)).to_have_attribute("aria-pressed", "true")


def test_hostile_text_is_shown_inertly(visit: Visit) -> None:
    page = visit()
    read(page, HOSTILE)
    shown = "".join(page.locator("#explore-tokens button.qs-token").all_text_contents())
    assert shown.startswith("<script>window.hit=1</script><img src=x onerror='window.hit=2'> \"q\" ${1} {{x}} `b`")
    assert "\\u202e" in shown
    assert "مرحبا" in shown.replace(" ", "") or "م" in shown
    assert "🙂" in shown
    for part in page.locator("#explore-heat tbody tr").all()[:2]:
        part.locator("button").click()
    assert page.evaluate("window.hit") is None
    assert page.locator("#explore-tokens img").count() == 0


def test_errors_are_sentences_and_the_page_stays(visit: Visit) -> None:
    page = visit()
    read(page)
    page.locator("#explore-text textarea").fill(" ")
    page.locator("#explore-read").click()
    expect(page.locator("#explore-notice [role=alert]")).to_contain_text("The text is empty")
    expect(page.locator("#explore-heat table")).to_be_visible()
    read(page, "Fine again")
    expect(page.locator("#explore-notice [role=alert]")).to_have_count(0)


def test_light_and_dark_and_a_tablet(visit: Visit) -> None:
    backgrounds = []
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme, viewport={"width": 834, "height": 1112})
        read(page)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 834
        backgrounds.append(page.evaluate("getComputedStyle(document.querySelector('.qs-card')).backgroundColor"))
    assert backgrounds[0] != backgrounds[1]
    before = page.evaluate("document.body.classList.contains('dark')")
    page.locator("#qs-theme").click()
    assert page.evaluate("document.body.classList.contains('dark')") is not before


def test_a_text_outlives_a_reload(visit: Visit) -> None:
    page = visit()
    read(page, "Hallo & <b>?=#%")
    slider = page.locator("#explore-layer input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    page.wait_for_function("new URLSearchParams(location.search).get('layer') === '4'")
    page.reload()
    expect(page.locator("#explore-heat table")).to_be_visible()
    expect(page.locator("#explore-text textarea")).to_have_value("Hallo & <b>?=#%")
    expect(page.locator("#explore-layer input[type=number]")).to_have_value("4")
    assert "".join(page.locator("#explore-tokens button.qs-token").all_text_contents()) == "Hallo & <b>?=#%"


def test_links_to_texts_that_can_not_be_read(visit: Visit) -> None:
    for query, says in (
        ("?text=Hi&layer=99", "no SAE for layer 99"),
        ("?text=Hi&layer=x", "The layer must be a whole number"),
        ("?text=%20", "The text is empty"),
    ):
        expect(visit(query).locator("#explore-notice [role=alert]")).to_contain_text(says)

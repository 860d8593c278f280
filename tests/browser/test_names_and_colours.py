"""Names beside numbers, one line that says what a feature is, colours that differ, the heat map in its card."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from explored import GERMAN, LAYER
from playwright.sync_api import Page, expect
from test_explore_page import TEXT, read

from qwen_scope.explorer import AppState

Visit = Callable[..., Page]

BACKGROUND = "one => getComputedStyle(one).backgroundColor"


def test_every_number_has_a_name_beside_it(visit: Visit, state: AppState) -> None:
    page = visit()
    layer = read(page)
    for place in ("#explore-token-features .qs-row", "#explore-text-features .qs-row", "#explore-heat tbody th"):
        rows = page.locator(place)
        assert rows.count() > 5
        assert rows.locator(".qs-called, .qs-hint").count() == rows.count()
    for one in state.scope.features([TEXT], [layer]).strongest(0, layer, 12):
        row = page.locator("#explore-text-features .qs-row", has=page.get_by_text(str(one.feature), exact=True))
        named = state.label(layer, one.feature)
        assert named is not None
        expect(row).to_contain_text(named.text)
        assert row.locator(".qs-score").count() == (named.score is not None)

    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-examples button").first.click()
    page.locator("#compare-go").click()
    rows = page.locator("#compare-ranking tr[data-shade]")
    expect(rows.first).to_be_visible()
    assert rows.locator(".qs-called, .qs-hint").count() == rows.count()
    page.get_by_role("tab", name="Steer").click()
    expect(page.locator("#steer-list .qs-choice :is(.qs-called, .qs-hint)")).to_have_count(1)


def test_a_line_says_what_a_feature_is_and_a_legend_what_colours_mean(visit: Visit) -> None:
    page = visit()
    line = page.locator(".qs-what p")
    expect(line).to_contain_text("A feature is a direction")
    assert line.evaluate("one => one.clientHeight") < 30  # one line, at 1280 pixels
    for words in ("activation", "probability", "changed by an intervention", "does not count", "a label", "promotes"):
        expect(page.locator(".qs-key")).to_contain_text(words)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_activation_probability_and_changed_positions_differ(visit: Visit, scheme: str) -> None:
    page = visit(color_scheme=scheme)
    read(page)
    shown = {page.locator("#explore-tokens .qs-token[style*='--v:1.0']").first.evaluate(BACKGROUND)}
    page.get_by_role("tab", name="Steer").click()
    shown.add(page.locator("#steer-preview .qs-changed").first.evaluate(BACKGROUND))
    page.locator("#steer-run").click()
    surest = page.locator("#steer-steered .qs-token.qs-prob")
    expect(surest.first).to_be_visible()
    shown.add(surest.evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor).sort()")[0])
    assert len(shown) == 3


@pytest.mark.parametrize("width", [1280, 820])
def test_the_heat_map_fills_its_card_with_its_switches_inside(visit: Visit, width: int) -> None:
    page = visit(viewport={"width": width, "height": 900})
    read(page, GERMAN[1])
    card, table = page.locator("#explore-heat .qs-card"), page.locator("#explore-heat table")
    inner, outer = table.bounding_box(), card.bounding_box()
    assert inner is not None
    assert outer is not None
    assert inner["width"] > 0.9 * outer["width"]
    columns = table.locator("thead th").count()
    counted = card.get_by_role("switch", name="only tokens that count")
    expect(counted).to_have_attribute("aria-checked", "true")
    counted.click()
    expect(counted).to_have_attribute("aria-checked", "false")
    expect(table.locator("thead th")).to_have_count(columns + 1)  # the first token, which does not count
    page.locator("#explore-tokens button.qs-token").nth(2).click()
    expect(page.locator("#explore-tokens button.qs-token").nth(2)).to_have_attribute("aria-pressed", "true")
    expect(card.get_by_role("switch", name="only tokens that count")).to_have_attribute("aria-checked", "false")


def test_empty_states_fill_the_width(visit: Visit) -> None:
    for tab, place in (("explore", "#explore-tokens"), ("steer", "#steer-plain"), ("feature", "#feature-title"),
                       ("compare", "#compare-ranking"), ("datasets", "#datasets-result")):  # fmt: skip
        page = visit(f"?tab={tab}")
        expect(page.locator(f"{place} .qs-empty")).to_be_visible()
        box, whole = page.locator(f"{place} .qs-card").bounding_box(), page.locator("#qs-tabs").bounding_box()
        assert box is not None
        assert whole is not None
        share = 0.55 if tab == "steer" else 0.95  # beside the prompt's column
        assert box["width"] > share * whole["width"]


def test_what_is_demoted_looks_unlike_what_is_promoted(visit: Visit) -> None:
    page = visit(f"?layer={LAYER}&feature=5")
    effects = page.locator("#feature-effects .qs-effects")
    expect(effects.first).to_be_visible()
    assert effects.nth(0).locator(".qs-bar-less").count() == 0
    assert effects.nth(1).locator(".qs-bar-less").count() == effects.nth(1).locator("li").count() > 0
    expect(effects.nth(0).locator(".qs-value").first).to_contain_text("+")
    expect(effects.nth(1).locator(".qs-value").first).to_contain_text("−")

"""The page of a feature: contexts, whole documents, and the ways to Steer and Why."""

from __future__ import annotations

from collections.abc import Callable

from explored import GERMAN, LAYER
from playwright.sync_api import Page, expect
from test_explore_page import read

from qwen_scope.explorer import AppState
from qwen_scope.report import visible

Visit = Callable[..., Page]


def of_german(state: AppState) -> int:
    return state.scope.features([GERMAN[1]], [LAYER]).strongest(0, LAYER, 1)[0].feature


def test_contexts_show_the_token_that_fires_and_whole_documents(visit: Visit, state: AppState) -> None:
    feature = of_german(state)
    page = visit(f"?layer={LAYER}&feature={feature}")
    rows = page.locator("#feature-contexts .qs-contexts").first.locator("li")
    expect(rows.first).to_be_visible()
    with state.store("german") as store:
        found = store.contexts(LAYER, feature, 12, before=1000, after=1000, per_document=True)
    for row, context in zip(rows.all(), found, strict=True):
        token = visible(context.tokens[context.position - context.start]) or "·"
        expect(row.locator(".qs-place .qs-token")).to_have_text(token)
        expect(row.locator(".qs-tokens .qs-peak")).to_have_text(token)
        assert row.locator(".qs-tokens").inner_text()[:1] != " "
    page.get_by_role("switch", name="whole documents").click()
    whole = page.locator("#feature-contexts .qs-whole")
    expect(whole.first).to_be_visible()
    for box, context in zip(whole.all(), found, strict=False):
        expect(box).to_contain_text("".join(map(visible, context.tokens[:4])))
        expect(box.locator(".qs-peak")).to_have_count(1)
    page.get_by_role("switch", name="whole documents").click()
    expect(rows.first.locator(".qs-place")).to_be_visible()


def test_a_feature_goes_to_steer_and_to_why(visit: Visit, state: AppState) -> None:
    feature = of_german(state)
    page = visit(f"?layer={LAYER}&feature={feature}")
    page.get_by_role("button", name="Steer with this").click()
    expect(page.get_by_role("tab", name="Steer")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#steer-list .qs-choice")).to_contain_text(f"of feature {feature}, layer {LAYER}")
    page.get_by_role("tab", name="Feature").click()
    page.get_by_role("button", name="Why", exact=True).click()
    expect(page.get_by_role("tab", name="Why")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#why-feature input, #why-feature textarea")).to_have_value(f"{LAYER}/{feature}")


def test_a_link_to_a_feature_opens_here_and_nothing_of_the_page_is_lost(visit: Visit) -> None:
    page = visit()
    read(page)
    page.evaluate("window.stays = true")
    row = page.locator("#explore-text-features li").first
    feature = row.locator(".qs-id").text_content()
    row.locator("a.qs-open").click()
    expect(page.get_by_role("tab", name="Feature")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#feature-title h2")).to_contain_text(f"Feature {feature}")
    assert page.evaluate("window.stays") is True
    page.get_by_role("tab", name="Explore").click()
    expect(page.locator("#explore-heat table")).to_be_visible()


def test_german_works_at_the_first_click(visit: Visit, state: AppState) -> None:
    page = visit("?tab=steer")
    expect(page.locator("#steer-preview .qs-token").first).to_be_visible()
    page.locator("#steer-run").click()
    steered = page.locator("#steer-steered button.qs-token")
    expect(steered.first).to_be_visible()
    text = "".join(steered.all_text_contents())
    assert sum(word in text for word in (" der", " im ", " mit", " ist", "en ")) >= 2
    assert text.isascii() or "ß" in text or "ü" in text or "ö" in text
    page.locator("#steer-feature input").fill("7")
    expect(page.locator("#steer-list .qs-choice")).to_contain_text("feature 7")
    page.locator("#steer-presets button").first.click()
    first = next(iter(state.presets.values()))
    expect(page.locator("#steer-list .qs-choice")).to_contain_text(f"{first['amount']} × typical residual")

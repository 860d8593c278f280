"""Compare, Steer, Feature and Datasets, as a visitor uses them."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from explored import ENGLISH, GERMAN, LAYER
from filled import CONTROLS, fill
from playwright.sync_api import Page, expect

from qwen_scope.analysis import Rule, RuleFeature
from qwen_scope.explorer import AppState
from qwen_scope.store import FeatureStore

Visit = Callable[..., Page]
PATIENCE_S = 60


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def test_two_texts_are_compared_and_rows_shade_both(visit: Visit, state: AppState) -> None:
    page = visit()
    tab(page, "Compare")
    for side, text in zip("ab", (GERMAN[0], ENGLISH[0]), strict=True):
        page.locator(f"#compare-text-{side} textarea").fill(text)
    page.locator("#compare-go").click()
    rows = page.locator("#compare-ranking tr[data-shade]")
    found = state.scope.compare(GERMAN[0], ENGLISH[0])
    expected = [one.feature for ranked in found.values() for one in ranked]
    expect(rows).to_have_count(len(expected))
    assert [int(text) for text in page.locator("#compare-ranking .qs-id").all_text_contents()] == expected

    rows.nth(7).hover()
    expect(rows.nth(7)).to_have_class("qs-shading")
    shade = json.loads(rows.nth(7).get_attribute("data-shade") or "")
    for side in "ab":
        chips = page.locator(f"[data-side={side}] .qs-token")
        styles = chips.evaluate_all("chips => chips.map(chip => chip.style.getPropertyValue('--v'))")
        assert [i for i, style in enumerate(styles) if style] == [i for i, _ in shade[side]]


def test_two_uploaded_sets_are_compared(visit: Visit, state: AppState, files: Path) -> None:
    page = visit()
    tab(page, "Compare")
    for side, texts in zip("ab", (GERMAN[:3], ENGLISH), strict=True):
        path = files / f"{side}.txt"
        path.write_text("\n".join(texts))
        page.locator("text=or upload a set of texts").nth("ab".index(side)).click()
        page.locator(f"#compare-file-{side} input[type=file]").set_input_files(path)
        expect(page.locator(f"#compare-file-{side}")).to_contain_text(re.compile(rf"{side}\s*\.txt"))
    page.locator("#compare-go").click()
    expected = state.scope.compare(GERMAN[:3], ENGLISH)[0][0].feature
    expect(page.locator("#compare-ranking .qs-id").first).to_have_text(str(expected))
    expect(page.locator("[data-side=a] .qs-tokens")).to_have_count(3)


def test_steering_streams_side_by_side_and_tokens_tell_their_rivals(visit: Visit) -> None:
    page = visit()
    tab(page, "Steer")
    page.locator("#steer-amount input").fill("0.8")
    page.locator("#steer-run").click()
    steered = page.locator("#steer-steered button.qs-token")
    expect(steered.first).to_be_visible()
    expect(page.locator("#steer-plain button.qs-token").first).to_be_visible()
    steered.first.click()
    expect(page.locator("#steer-candidates tr")).to_have_count(10)


def test_positions_are_previewed_and_bad_ones_refused(visit: Visit, state: AppState) -> None:
    page = visit()
    tab(page, "Steer")
    page.locator("#steer-where input, #steer-where textarea").fill("1,3-4")
    expect(page.locator("#steer-preview .qs-changed")).to_have_count(3)
    page.locator("#steer-where input, #steer-where textarea").fill("first three")
    expect(page.locator("#steer-preview [role=alert]")).to_contain_text("is not a position")
    page.locator("#steer-run").click()
    expect(page.locator("#steer-notice [role=alert]")).to_contain_text("is not a position")
    page.locator("#steer-where input, #steer-where textarea").fill("all")
    page.locator("#steer-feature input").fill("999999")
    page.locator("#steer-run").click()
    expect(page.locator("#steer-notice [role=alert]")).to_contain_text("There is no feature 999999")


def test_a_generation_can_be_stopped(visit: Visit, state: AppState) -> None:
    page = visit()
    tab(page, "Steer")
    page.get_by_role("button", name="Sampling").click()
    page.get_by_label("number input for Most new tokens").fill("300")
    page.locator("#steer-amount input").fill("4")  # so far out that the text never ends by itself
    slowly = state.scope.model.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    try:
        page.locator("#steer-run").click()
        expect(page.locator("#steer-steered .qs-prose")).not_to_be_empty()
        page.locator("#steer-stop").click()
        expect(page.locator("#steer-steered .qs-heading")).to_contain_text("stopped")
    finally:
        slowly.remove()
    for _ in range(100):
        if state.jobs.running == 0:
            break
        page.wait_for_timeout(100)
    assert state.jobs.running == 0


def test_several_features_become_a_recipe_and_come_back(visit: Visit, files: Path) -> None:
    page = visit()
    tab(page, "Steer")
    page.get_by_role("button", name="+ another feature").click()
    expect(page.locator("#steer-list .qs-choice")).to_have_count(2)
    page.locator("#steer-feature input").fill("7")
    expect(page.locator("#steer-list .qs-choice").nth(1)).to_contain_text("feature 7")
    page.get_by_role("button", name="Recipes").click()
    with page.expect_download() as download:
        page.locator("#steer-save").click()
    download.value.save_as(files / "kept.json")
    assert len(json.loads((files / "kept.json").read_text())["interventions"]) == 2

    other = visit()
    tab(other, "Steer")
    other.get_by_role("button", name="Recipes").click()
    with other.expect_file_chooser() as chooser:
        other.locator("#steer-load").click()
    chooser.value.set_files(files / "kept.json")
    expect(other.locator("#steer-list .qs-choice")).to_have_count(2)
    expect(other.locator("#steer-list .qs-choice").nth(1)).to_contain_text("feature 7")


def test_a_sweep_sets_light_medium_and_strong(visit: Visit) -> None:
    page = visit()
    tab(page, "Steer")
    page.get_by_role("button", name="Strength sweep").click()
    page.locator("#steer-sweep").click()
    doses = page.locator("#steer-doses article")
    expect(doses.first).to_be_visible()
    assert doses.count() > 5
    proposed = page.locator("#steer-doses .qs-best header b").text_content()
    assert proposed
    page.get_by_role("button", name="Strong", exact=True).click()
    expect(page.locator("#steer-list .qs-choice")).to_contain_text("typical residual")
    page.wait_for_function(
        "want => Math.abs(document.querySelector('#steer-amount input').value - want) < 0.01 * want",
        arg=float(proposed),
    )


def test_a_link_opens_a_feature_and_its_notes_stay(visit: Visit, state: AppState) -> None:
    feature = state.scope.features(GERMAN, [LAYER]).strongest(3, LAYER, 1)[0].feature  # fires on the hostile text
    page = visit(f"?layer={LAYER}&feature={feature}")
    expect(page.locator("#feature-title h2")).to_contain_text(f"Feature {feature}")
    expect(page.locator("#feature-contexts li").first).to_be_visible()
    page.locator("#feature-note textarea").fill("<b>my</b> note")
    page.locator("#feature-write").click()
    expect(page.locator("#feature-notes li p").last).to_have_text("<b>my</b> note")
    assert page.evaluate("window.hit") is None

    other = visit(f"?layer={LAYER}&feature={feature}")
    expect(other.locator("#feature-notes li p").last).to_have_text("<b>my</b> note")
    other.locator("#feature-number input").fill("5")
    other.locator("#feature-open").click()
    expect(other.locator("#feature-title h2")).to_contain_text("Feature 5")
    other.wait_for_function("want => location.search === want", arg=f"?layer={LAYER}&feature=5")


def test_links_to_features_that_do_not_exist(visit: Visit) -> None:
    for query, says in (
        (f"?layer={LAYER}&feature=2048", "There is no feature 2048"),
        ("?layer=99&feature=1", "no SAE for layer 99"),
        (f"?layer={LAYER}&feature=%3Cscript%3E", "The feature must be a whole number"),
        ("?layer=2", "The feature must be a whole number"),
    ):
        page = visit(query)
        expect(page.locator("#feature-notice [role=alert]")).to_contain_text(says)


def test_stores_are_compared_and_a_decision_is_traced(visit: Visit, state: AppState, files: Path) -> None:
    page = visit("?tab=datasets")
    for name, part in (("Overlap", "svg"), ("Coverage", "svg polyline"), ("Drift", "table")):
        page.locator("#datasets-analysis input").click()
        page.get_by_role("option").filter(has_text=name).click()
        page.locator("#datasets-go").click()
        expect(page.locator("#datasets-result .qs-heading").first).to_contain_text(name)
        expect(page.locator(f"#datasets-result {part}").first).to_be_visible()

    best = state.scope.features([GERMAN[0]], [LAYER]).strongest(0, LAYER, 1)[0]
    one = RuleFeature(
        LAYER, best.feature, best.maximum / 2, best.maximum, 1.0, state.scope.saes[LAYER].identity.fingerprint
    )
    Rule("about <i>trains</i>", (one,)).save(files / "rule.json")
    page.get_by_role("button", name="Trace a classifier").click()
    page.locator("#trace-rule input[type=file]").set_input_files(files / "rule.json")
    page.locator("#trace-text textarea").fill(GERMAN[0])
    expect(page.locator("#trace-rule")).to_contain_text(re.compile(r"rule\s*\.json"))
    page.locator("#trace-go").click()
    expect(page.locator("#trace-result .qs-heading")).to_contain_text("“about <i>trains</i>”positive")
    expect(page.locator("#trace-result tbody tr").first).to_contain_text(f"token {best.position}")


def test_an_analysis_shows_progress_and_can_be_stopped(
    visit: Visit, state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, opened = threading.Event(), state.store

    def slowly(name: str) -> FeatureStore:
        assert go_on.wait(PATIENCE_S)
        return opened(name)

    page = visit("?tab=datasets")
    expect(page.locator("#datasets-go")).to_be_visible()
    monkeypatch.setattr(state, "store", slowly)
    try:
        page.locator("#datasets-go").click()
        result = page.locator("#datasets-result")
        expect(result.locator("[role=status]")).to_contain_text("reading")
        page.locator("#datasets-stop").click()
        expect(result.locator("[role=status]")).to_contain_text("stopping")
    finally:
        go_on.set()
    expect(result).to_contain_text("The analysis was stopped before its end")
    page.locator("#datasets-go").click()
    expect(result.locator("svg").first).to_be_visible()


@pytest.mark.parametrize("name", CONTROLS)
def test_on_a_tablet_nothing_hangs_over_and_the_keyboard_reaches_every_control(
    visit: Visit, state: AppState, name: str
) -> None:
    page = visit(f"?tab={name}", viewport={"width": 820, "height": 1180})
    controls = [page.locator(control) for control in CONTROLS[name]]
    expect(controls[0]).to_be_visible()
    fill(page, name, state)
    assert page.evaluate("document.documentElement.scrollWidth") <= 820
    for control in controls:
        box = control.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 820

    selectors = list(CONTROLS[name])
    missing = set(selectors)
    page.evaluate("document.body.tabIndex = -1; document.body.focus()")
    for _ in range(150):
        page.keyboard.press("Tab")
        missing -= set(page.evaluate("all => all.filter((one) => document.activeElement.matches(one))", selectors))
        if not missing:
            break
    assert missing == set()

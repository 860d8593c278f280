"""Where something takes long, a spinner says what; and an answer that comes late leaves the visitor where they are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from explored import LAYER
from playwright.sync_api import Page, expect

from qwen_scope.explorer import AppState
from qwen_scope.explorer.stages import stage

Visit = Callable[..., Page]
PATIENCE_S = 60


def slowed(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> threading.Event:
    """Have a method wait, in a stage of its own, until the event that is returned is set."""
    go_on, real = threading.Event(), getattr(where, name)

    def slowly(*args: Any, **options: Any) -> Any:
        stage("loading the SAE of layer 99")
        assert go_on.wait(PATIENCE_S)
        return real(*args, **options)

    monkeypatch.setattr(where, name, slowly)
    return go_on


def test_a_spinner_tells_the_stage(visit: Visit, state: AppState, monkeypatch: pytest.MonkeyPatch) -> None:
    page = visit()
    expect(page.locator("#explore-text textarea")).to_be_visible()
    go_on = slowed(monkeypatch, state, "seen")
    try:
        page.locator("#explore-text textarea").fill("Hello there")
        page.locator("#explore-read").click()
        waiting = page.locator("#explore-notice [role=status]")
        expect(waiting).to_contain_text("loading the SAE of layer 99")
        expect(waiting.locator(".qs-spin")).to_be_visible()
    finally:
        go_on.set()
    expect(page.locator("#explore-heat table")).to_be_visible()
    expect(page.locator("#explore-notice [role=status]")).to_have_count(0)


def test_the_first_steered_token_is_waited_for_with_its_stage(
    visit: Visit, state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit("?tab=steer")
    expect(page.locator("#steer-run")).to_be_visible()
    go_on, real = threading.Event(), type(state.scope.stats).__getitem__

    def slowly(stats: Any, layer: int) -> Any:
        assert go_on.wait(PATIENCE_S)
        return real(stats, layer)

    monkeypatch.setattr(type(state.scope.stats), "__getitem__", slowly)
    try:
        page.locator("#steer-run").click()
        expect(page.locator("#steer-notice [role=status]")).to_contain_text("measuring typical residuals of layer 5")
    finally:
        go_on.set()
    expect(page.locator("#steer-steered button.qs-token").first).to_be_visible()
    expect(page.locator("#steer-notice [role=status]")).to_have_count(0)


def test_a_late_answer_does_not_take_the_visitor_away(
    visit: Visit, state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = slowed(monkeypatch, state, "feature_page")
    try:
        page = visit(f"?layer={LAYER}&feature=5")
        expect(page.get_by_role("tab", name="Feature")).to_have_attribute("aria-selected", "true")
        page.get_by_role("tab", name="Compare").click()
        expect(page.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true")
    finally:
        go_on.set()
    expect(page.locator("#feature-title h2")).to_contain_text("Feature 5")
    page.wait_for_timeout(500)
    expect(page.get_by_role("tab", name="Compare")).to_have_attribute("aria-selected", "true")


def test_an_answer_that_leads_elsewhere_is_dropped_once_the_visitor_has_left(
    visit: Visit, state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit(f"?layer={LAYER}&feature=5")
    expect(page.locator("#feature-title h2")).to_contain_text("Feature 5")
    go_on = slowed(monkeypatch, state.names, "learn")  # what the list of interventions asks for
    try:
        page.get_by_role("button", name="Steer with this").click()
        page.get_by_role("tab", name="Explore").click()
    finally:
        go_on.set()
    expect(page.locator("#feature-notice [data-go]")).to_have_count(1)
    page.wait_for_timeout(500)
    expect(page.get_by_role("tab", name="Explore")).to_have_attribute("aria-selected", "true")
    page.get_by_role("tab", name="Steer").click()
    expect(page.locator("#steer-list .qs-choice")).to_contain_text(f"of feature 5, layer {LAYER}")

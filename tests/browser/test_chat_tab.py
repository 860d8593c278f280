"""The Chat tab: several turns, the recipe on or off turn by turn, thinking apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from qwen_scope.explorer import AppState, chatting

Visit = Callable[..., Page]


def say(page: Page, text: str, turns: int) -> None:
    page.locator("#chat-message textarea").fill(text)
    page.locator("#chat-send").click()
    expect(page.locator("#chat-talk article")).to_have_count(turns)
    expect(page.locator("#chat-talk .qs-act").first).to_be_visible()


def test_turns_follow_each_other_and_the_recipe_is_on_or_off_in_each(visit: Visit) -> None:
    page = visit("?tab=chat")
    page.get_by_label("number input for Most new tokens").fill("8")
    say(page, "Wo ist der Bahnhof?", 2)
    turns = page.locator("#chat-talk article")
    expect(turns.nth(1).locator(".qs-badge")).to_contain_text("recipe on")
    expect(page.locator("#chat-message textarea")).to_have_value("")
    page.locator("#chat-on input").uncheck()
    say(page, "Thanks!", 4)
    expect(turns.nth(3).locator(".qs-badge")).to_have_text("recipe off")
    expect(turns.nth(1).locator(".qs-badge")).to_contain_text("recipe on")
    before = turns.nth(3).locator(".qs-said").inner_text()
    page.get_by_role("button", name="Answer again with the recipe").click()
    expect(turns.nth(3).locator(".qs-badge")).to_contain_text("recipe on")
    expect(page.get_by_role("button", name="Answer again without the recipe")).to_be_visible()
    page.get_by_role("button", name="Answer again without the recipe").click()
    expect(turns.nth(3).locator(".qs-badge")).to_have_text("recipe off")
    expect(turns.nth(3).locator(".qs-said")).to_have_text(before)  # the same draws
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#chat-talk .qs-empty")).to_be_visible()


def test_the_recipe_is_that_of_steer(visit: Visit) -> None:
    page = visit("?tab=chat")
    expect(page.locator("#chat-recipe")).to_contain_text("of feature 678, layer 5")
    page.get_by_role("button", name="Edit it in Steer").click()
    expect(page.get_by_role("tab", name="Steer")).to_have_attribute("aria-selected", "true")
    page.locator("#steer-feature input").fill("7")
    expect(page.locator("#steer-list .qs-choice")).to_contain_text("feature 7")
    page.get_by_role("tab", name="Chat").click()
    expect(page.locator("#chat-recipe")).to_contain_text("of feature 7, layer 5")


def test_thinking_is_shown_apart(visit: Visit, state: AppState, monkeypatch: pytest.MonkeyPatch) -> None:
    real = chatting.apart
    monkeypatch.setattr(
        chatting, "apart", lambda *given: real("<think>\nhm, <b>let\n\nme</b></think>\n\nYes", *given[1:])
    )
    page = visit("?tab=chat")
    page.get_by_label("number input for Most new tokens").fill("4")
    say(page, "Hello", 2)
    answer = page.locator("#chat-talk article").nth(1)
    expect(answer.locator(".qs-said")).to_have_text("Yes")
    expect(answer.locator(".qs-thinking")).to_be_hidden()
    answer.locator("summary").click()
    expect(answer.locator(".qs-thinking")).to_contain_text("hm, <b>let")


def test_what_can_not_be_said_is_told(visit: Visit) -> None:
    page = visit("?tab=chat")
    page.locator("#chat-send").click()
    expect(page.locator("#chat-notice [role=alert]")).to_contain_text("The message is empty")

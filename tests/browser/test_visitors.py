"""Several visitors at once, and what they share: the model, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page, expect
from test_explore_page import read

Visit = Callable[..., Page]


def test_two_visitors_do_not_see_each_other(visit: Visit) -> None:
    ada, bob = visit(), visit()
    read(ada, "Where is the station?")
    read(bob, "Der Zug kommt um neun.")
    ada.locator("#explore-tokens button.qs-token").nth(1).click()
    expect(ada.locator("#explore-tokens button.qs-token").nth(1)).to_have_attribute("aria-pressed", "true")
    assert "".join(ada.locator("#explore-tokens button.qs-token").all_text_contents()) == "Where is the station?"
    assert "".join(bob.locator("#explore-tokens button.qs-token").all_text_contents()) == "Der Zug kommt um neun."

    for page, feature in ((ada, "11"), (bob, "22")):
        page.get_by_role("tab", name="Steer").click()
        page.locator("#steer-feature input").fill(feature)
        expect(page.locator("#steer-list .qs-choice")).to_contain_text(f"feature {feature}")
    expect(ada.locator("#steer-list .qs-choice")).to_contain_text("feature 11")


def test_one_visitor_stops_only_their_own_work(visit: Visit) -> None:
    ada, bob = visit(), visit()
    for page in (ada, bob):
        page.get_by_role("tab", name="Steer").click()
    bob.locator("#steer-run").click()
    ada.locator("#steer-stop").click()
    expect(bob.locator("#steer-steered button.qs-token").first).to_be_visible()

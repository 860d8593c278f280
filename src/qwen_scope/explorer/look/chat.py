"""What the Chat tab shows, as markup: the turns, the model's thinking apart, and what each answer was steered by."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_scope.report import Markup, element, join

from ..chatting import Turn
from .components import act, card, heading, lines

HINT = "Say something below. Each answer is steered by the recipe of the tab Steer, or not, as you choose turn by turn."


def turn_panel(turn: Turn) -> Markup:
    """One turn; the model's thinking folds away once it has begun to answer."""
    mine = turn.role == "user"
    who = "You" if mine else "Model"
    steered = None
    if not mine:
        steered = element(
            "span", f"recipe on: {turn.recipe}" if turn.recipe else "recipe off",
            class_="qs-badge" + (" qs-badge-on" if turn.recipe else ""),
        )  # fmt: skip
    head = element("header", element("b", who), " ", steered, " ", element("span", turn.state, class_="qs-note"))
    thinking = None
    if turn.thinking:
        still = turn.state == "writing" and not turn.text
        thinking = element(
            "details", element("summary", "thinking" + (" …" if still else "")),
            element("div", *lines(turn.thinking), class_="qs-thinking", dir="auto"), open=still,
        )  # fmt: skip
    body = element("div", *lines(turn.text), class_="qs-said", dir="auto")
    return element("article", head, thinking, body, class_="qs-turn" + (" qs-mine" if mine else ""))


def chat_panel(turns: Sequence[Turn]) -> Markup:
    """The conversation, with what can be done about the last answer."""
    if not turns:
        return card(element("p", HINT, class_="qs-empty"))
    shown = [turn_panel(one) for one in turns]
    last, acts = turns[-1], Markup("")
    if last.role == "assistant" and last.state != "writing":
        other = "without the recipe" if last.recipe else "with the recipe"
        acts = element(
            "div", act(f"Answer again {other}", f"again:{0 if last.recipe else 1}"), act("New conversation", "new:0"),
            class_="qs-acts",
        )  # fmt: skip
    return card(element("div", *shown, class_="qs-talk", role="log", aria_label="Conversation"), acts)


def recipe_panel(sentences: Sequence[Markup]) -> Markup:
    """What a turn is steered by when its switch is on."""
    rows = [element("li", one) for one in sentences]
    edit = act("Edit it in Steer", "steer:0")
    return card(heading("The recipe"), element("ul", *rows, class_="qs-rules"), join(edit))

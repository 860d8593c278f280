"""What the Steer tab shows, as markup: interventions, the tokens they touch, both continuations, the sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_scope.features import Sweep
from qwen_scope.report import Markup, element, join, visible
from qwen_scope.steer import Generation, Where

from .components import bar, card, chip, heading, lines, name_of, number, percent, scale
from .explore import Label

OPS = {
    "add": "add",
    "scale": "scale",
    "clamp": "hold at",
    "floor": "keep at least",
    "cap": "keep at most",
    "ablate": "remove",
}
UNITS = {"resid_norm": "× typical residual", "max_act": "× largest activation", "raw": "raw"}


def sentence(one: Mapping[str, Any], label: Label = lambda layer, feature: None) -> Markup:
    """An intervention in words, with what the feature is called."""
    feature = "?" if one["feature"] in (None, "") else one["feature"]
    amount = "" if one["op"] == "ablate" else f" {one['amount']}"
    unit = f" {UNITS[one['unit']]}" if one["op"] in ("add", "clamp", "floor", "cap") else ""
    named = label(int(one["layer"]), int(feature)) if str(feature).isdecimal() else None
    called = join(" ", name_of(named)) if named is not None else None
    words = f"{OPS[one['op']]}{amount}{unit} of feature {feature}, layer {one['layer']}, at {one['where']}"
    return join(words, called)


def list_panel(rows: Sequence[Mapping[str, Any]], selected: int, label: Label = lambda layer, feature: None) -> Markup:
    """The interventions; each can be chosen for editing or dropped."""
    made = []
    for i, one in enumerate(rows):
        choose = element(
            "button", sentence(one, label), type="button", class_="qs-choice", data_pick=f"row:{i}",
            aria_pressed=str(i == selected).lower(),
        )  # fmt: skip
        drop = element("button", "×", type="button", class_="qs-drop", data_pick=f"drop:{i}",
                       aria_label=f"Drop intervention {i + 1}") if len(rows) > 1 else None  # fmt: skip
        made.append(element("li", choose, drop))
    add = element("button", "+ another feature", type="button", class_="qs-add", data_pick="add:0")
    return join(element("ol", *made, class_="qs-choices"), add)


def preview_panel(tokens: Sequence[str], touched: Sequence[bool], where: Sequence[Where]) -> Markup:
    """The prompt as tokens, those that are changed in a colour of their own."""
    made = [
        chip(token, class_="qs-changed" if on else "", title=f"position {i}{', changed' if on else ''}")
        for i, (token, on) in enumerate(zip(tokens, touched, strict=True))
    ]
    beyond = max((one.reach for one in where), default=-1) >= len(tokens)
    later = any(one.generated for one in where)
    notes = [f"{sum(touched)} of {len(tokens)} prompt tokens are changed"]
    notes += ["every generated token too"] if later else []
    notes += ["listed positions beyond the prompt are changed once they are generated"] if beyond else []
    return join(
        element("div", *made, class_="qs-tokens qs-small", dir="auto"), element("p", "; ".join(notes), class_="qs-note")
    )


def growing_panel(title: str, text: str, remark: str) -> Markup:
    """A continuation while it is written."""
    return card(heading(title, remark), element("div", *lines(text), class_="qs-prose", dir="auto", aria_live="off"))


def side_panel(title: str, side: Generation, picked: int, remark: str = "") -> Markup:
    """A finished continuation: tokens shaded by the probability the model gave them."""
    made = [
        chip(
            token.text, token.probability or 0.0, 1.0, pick=f"token:{i}", pressed=i == picked, kind="prob",
            title=f"probability {percent(token.probability or 0.0)}",
        )
        for i, token in enumerate(side.tokens)
    ]  # fmt: skip
    end = "ended by itself" if side.finished else "ran to its limit"
    note = join(f"{len(side.tokens)} tokens, {end}{'; ' + remark if remark else ''} · probability ", scale("1", "prob"))
    body = element("div", *made, class_="qs-tokens", dir="auto", role="group", aria_label=title, data_roving=True)
    return card(heading(title, note), body)


def candidates_panel(title: str, side: Generation, at: int) -> Markup:
    """What the model might have written in the place of one token."""
    token = side.tokens[at]
    rows = [
        element(
            "tr",
            element("td", chip(one.text)),
            element("td", bar(one.probability, 1.0, "prob")),
            element("td", f"{100 * one.probability:.2f}%", class_="qs-figure qs-value"),
            class_="qs-chosen" if one.token_id == token.token_id else None,
        )
        for one in token.candidates
    ]
    note = join("instead of token ", at, " ", element("span", visible(token.text) or "·", class_="qs-token"))
    table = element("table", element("tbody", *rows), class_="qs-table qs-candidates")
    return card(heading(f"{title}: most probable tokens", note), table)


def sweep_panel(found: Sweep, in_lengths: bool) -> Markup:
    """Dose and response as small multiples: what each amount does, what it costs, and what it writes."""
    effects = [dose.effect.estimate for dose in found.doses]
    low, high = min(effects), max(effects)
    cards = []
    for dose in sorted(found.doses, key=lambda dose: dose.amount):
        best = found.proposed is not None and dose.amount == found.proposed
        marks = ["proposed" if best else "", "" if dose.fits else "over the budget"]
        facts = (
            ("effect", f"{number(dose.effect.estimate)} ({number(dose.effect.low)} to {number(dose.effect.high)})"),
            ("perplexity", number(dose.perplexity)),
            ("repetition", percent(dose.repetition)),
        )
        shown = [join(element("dt", name), element("dd", value)) for name, value in facts]
        cards.append(
            element(
                "article",
                element(
                    "header", element("b", number(dose.amount)), " ", ", ".join(filter(None, marks)) or "within budget"
                ),
                bar(dose.effect.estimate - low, high - low or 1.0),
                element("dl", *shown),
                element("p", visible(dose.example), dir="auto"),
                class_="qs-dose" + (" qs-best" if best else "") + ("" if dose.fits else " qs-over"),
            )
        )
    if found.best is None:
        note = "no amount inside the fluency budget does better than the unsteered model"
    elif not in_lengths:
        note = "the number above each text is a factor for all the amounts"
    else:
        note = "in typical residuals; Light, Medium and Strong are now a quarter, half and all of the proposal"
    return card(heading("Dose and response", note), element("div", *cards, class_="qs-doses"))

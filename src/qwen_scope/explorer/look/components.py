"""Pieces of HTML that the tabs share: token chips, ranked features, bars. Values in, markup out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_scope.report import Markup, element, join, visible
from qwen_scope.scope import TokenFeatures
from qwen_scope.text import summaries

from ..jobs import Told
from ..stages import Waiting

PIECE = 100
"""Characters of a text that are made inert at a time; of a longer token `visible` shows the beginning alone."""


@dataclass(frozen=True)
class Named:
    """What a feature is called.

    Attributes:
        text: its label, or the tokens that it promotes.
        score: how well the label scored, which is never shown without; None where there is no label.
    """

    text: str
    score: float | None


def number(value: float) -> str:
    """A number to three significant digits."""
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A share as people say it."""
    return f"{100 * value:.0f}%" if value >= 0.1 or value == 0 else f"{100 * value:.1f}%"


def strength(value: float, top: float) -> str | None:
    """The style that shades an element by `value / top`; None where nothing is to be shaded."""
    return f"--v:{min(1.0, value / top):.3f}" if value > 0 and top > 0 else None


def chip(
    token: str,
    value: float = 0.0,
    top: float = 1.0,
    *,
    pick: str | None = None,
    pressed: bool = False,
    title: str | None = None,
    left_out: str = "",
    class_: str = "",
    kind: str = "heat",
) -> Markup:
    """One token, shaded by its value; a button where it can be picked.

    Args:
        kind: what the value is: `heat` for an activation, `prob` for a probability.
        left_out: why the token does not count, such as `first` or `sink`; it is marked with a dashed frame.
    """
    shown = visible(token) or "·"
    if kind != "heat":
        class_ = f"qs-{kind} {class_}".strip()
    if left_out:
        class_, title = f"{class_} qs-left-out".strip(), " · ".join(filter(None, [title, f"left out: {left_out}"]))
    attributes = {
        "class_": f"qs-token {class_}".strip(),
        "style": strength(value, top),
        "title": title,
        "dir": "auto",
    }
    if pick is None:
        made = element("span", shown, **attributes)
    else:
        made = element("button", shown, type="button", data_pick=pick, aria_pressed=str(pressed).lower(), **attributes)
    return join(made, element("br")) if "\n" in token else made


def left_out_note(seen: TokenFeatures) -> Markup | None:
    """How many tokens rankings and averages leave out, and how chips mark them; None where every token counts."""
    said = summaries({layer: seen.tally(layer) for layer in seen.layers})
    if not said:
        return None
    mark = element("span", "token", class_="qs-token qs-left-out")
    return element("p", mark, f" {'; '.join(said)}; shown here, but in no ranking, rate or mean", class_="qs-note")


def quoted(token: str) -> Markup:
    """A token in a sentence."""
    return element("span", visible(token) or "·", class_="qs-token", dir="auto")


def lines(text: str) -> list[Markup | str]:
    """A text of any length with its line breaks, inert."""
    made: list[Markup | str] = []
    for line in text.split("\n"):
        made += [element("br"), *(visible(line[i : i + PIECE]) for i in range(0, len(line), PIECE))]
    return made[1:]


def chips(made: Sequence[Markup], label: str) -> Markup:
    """Tokens in the direction their text is read; arrow keys move among those that are buttons."""
    return element("div", *made, class_="qs-tokens", dir="auto", role="group", aria_label=label, data_roving=True)


def bar(value: float, top: float, kind: str = "heat") -> Markup:
    """A bar as long as `value / top`; `kind` as of a chip, or `less` for an effect below zero: it grows leftwards."""
    name = "qs-bar" if kind == "heat" else f"qs-bar qs-bar-{kind}"
    return element("span", element("span", style=strength(value, top)), class_=name, aria_hidden="true")


def name_of(named: Named | None) -> Markup:
    """A label with its score, or the tokens a feature promotes, or nothing."""
    if named is None:
        return Markup("")
    if named.score is None:
        said = f"no label; it promotes {named.text}"
        return element("span", "→ ", element("bdi", visible(named.text)), class_="qs-hint", title=visible(said))
    score = element("span", number(named.score), class_="qs-score", title="score of the label; 0.5 is chance")
    return element(
        "span", element("span", named.text, class_="qs-called", title=named.text), " ", score, class_="qs-label"
    )


def feature_link(layer: int, feature: int) -> Markup:
    """A link to the page of a feature."""
    return element(
        "a",
        "↗",
        href=f"?layer={layer}&feature={feature}",
        class_="qs-open",
        title=f"Open the page of feature {feature} of layer {layer}",
        aria_label=f"Open the page of feature {feature} of layer {layer}",
    )


def heading(text: str, note: str | Markup | None = None) -> Markup:
    """A section's title, with a quieter remark beside it."""
    quiet = element("span", note, class_="qs-note") if note else None
    return element("h3", text, quiet, class_="qs-heading")


def card(*children: Markup) -> Markup:
    """A part of the page that stands by itself."""
    return element("section", *children, class_="qs-card")


def empty(text: str) -> Markup:
    """What to do where there is nothing yet."""
    return card(element("p", text, class_="qs-empty"))


def examples(texts: Sequence[str]) -> Markup:
    """Things to begin with; each picks its number."""
    made = [
        element("button", text, type="button", class_="qs-example", data_pick=f"example:{i}", dir="auto")
        for i, text in enumerate(texts)
    ]
    return element("div", element("span", "Try", class_="qs-note"), *made, class_="qs-examples")


def scale(top: str, kind: str = "heat") -> Markup:
    """What the shades of a kind stand for, from 0 to the top; `kind` is `heat` for activations or `prob`."""
    legend = element("span", class_=f"qs-legend qs-legend-{kind}", aria_hidden="true")
    return element("span", "0 ", legend, " ", top, class_="qs-scale")


def switch(text: str, pick: str, on: bool) -> Markup:
    """A switch inside a card; a click picks it."""
    return element(
        "button", text, type="button", role="switch", aria_checked=str(on).lower(), class_="qs-switch", data_pick=pick
    )


def act(text: str, pick: str, title: str | None = None) -> Markup:
    """A button inside a card; a click picks it."""
    return element("button", text, type="button", class_="qs-act", data_pick=pick, title=title)


def go(tab: str, origin: str) -> Markup:
    """Has the browser open a tab, unless the visitor has left the one it was asked from meanwhile."""
    return element("span", hidden=True, data_go=tab, data_from=origin, data_at=time.monotonic_ns())


def waiting_panel(now: Waiting) -> Markup:
    """What takes so long; announced to screen readers."""
    took = f" … {now.seconds} s" if now.seconds else " …"
    spin = element("span", class_="qs-spin", aria_hidden="true")
    return element("div", spin, now.words + took, class_="qs-waiting", role="status")


def notice(sentence: str) -> Markup:
    """An error or a remark as a sentence, announced to screen readers."""
    return element("div", sentence[:1].upper() + sentence[1:], class_="qs-notice", role="alert")


def progress_panel(told: Told) -> Markup:
    """How far long work is."""
    words = f"{told.stage}: {percent(told.share)} {told.text}".strip()
    return card(element("div", bar(told.share, 1.0), element("span", words, class_="qs-note"), class_="qs-progress",
                        role="status"))  # fmt: skip

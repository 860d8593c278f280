"""Pieces of HTML that the tabs share: token chips, ranked features, bars. Values in, markup out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_scope.report import Markup, element, join, visible
from qwen_scope.scope import TokenFeatures
from qwen_scope.text import summaries

from .jobs import Told


@dataclass(frozen=True)
class Named:
    """A feature's label and how well it scored; a label is never shown without its score."""

    text: str
    score: float


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
) -> Markup:
    """One token, shaded by its value; a button where it can be picked.

    Args:
        left_out: why the token does not count, such as `first` or `sink`; it is marked with a dashed frame.
    """
    shown = visible(token) or "·"
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


def chips(made: Sequence[Markup], label: str) -> Markup:
    """Tokens in the direction their text is read; arrow keys move among those that are buttons."""
    return element("div", *made, class_="qs-tokens", dir="auto", role="group", aria_label=label, data_roving=True)


def bar(value: float, top: float) -> Markup:
    """A bar as long as `value / top`."""
    return element("span", element("span", style=strength(value, top)), class_="qs-bar", aria_hidden="true")


def name_of(named: Named | None) -> Markup:
    """A label with its score, or nothing."""
    if named is None:
        return Markup("")
    score = element("span", number(named.score), class_="qs-score", title="score of the label")
    return element("span", named.text, " ", score, class_="qs-label")


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


def notice(sentence: str) -> Markup:
    """An error or a remark as a sentence, announced to screen readers."""
    return element("div", sentence[:1].upper() + sentence[1:], class_="qs-notice", role="alert")


def progress_panel(told: Told) -> Markup:
    """How far long work is."""
    words = f"{told.stage}: {percent(told.share)} {told.text}".strip()
    return card(element("div", bar(told.share, 1.0), element("span", words, class_="qs-note"), class_="qs-progress",
                        role="status"))  # fmt: skip

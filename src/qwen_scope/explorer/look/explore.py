"""What the Explore tab shows, as markup: tokens, ranked features, the heat map, the text through depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import quote, urlencode

import numpy as np
from jaxtyping import Bool, Float

from qwen_scope.features import Neighbour
from qwen_scope.report import Markup, element, join, visible
from qwen_scope.scope import Strongest, TokenFeatures

from .components import (
    Named,
    bar,
    card,
    chip,
    chips,
    feature_link,
    heading,
    left_out_note,
    name_of,
    number,
    percent,
    quoted,
    scale,
    strength,
    switch,
)

RANKED = 12
HEAT_ROWS = 24
DEPTH_FEATURES = 5

ADDRESS = 2000
"""Characters of an address that every browser and proxy lets through."""

Label = Callable[[int, int], Named | None]


@dataclass(frozen=True)
class Reading:
    """What one visitor looks at: a text, how it is put to the model, a layer, a token and a feature (-1: none).

    Attributes:
        own_scale: each row of the heat map is shaded by its own maximum instead of the whole map's.
        only_counted: the heat map leaves out the columns of tokens that do not count.
    """

    text: str
    chat: str
    layer: int
    token: int = -1
    feature: int = -1
    own_scale: bool = True
    only_counted: bool = True

    def with_default_choice(self, seen: TokenFeatures) -> Reading:
        """The same with a token and a feature that exist: the strongest feature, and the token where it peaks."""
        token = self.token if 0 <= self.token < len(seen.tokens[0]) else -1
        if token >= 0 and self.feature >= 0:
            return self
        best = seen.strongest(0, self.layer, 1)
        if not best:
            return replace(self, token=max(token, 0))
        return replace(
            self,
            token=token if token >= 0 else best[0].position,
            feature=self.feature if self.feature >= 0 else best[0].feature,
        )


def address(reading: Reading) -> str:
    """The link to a reading; a long text is left out of it."""
    asked = {"tab": "explore", "layer": str(reading.layer), "chat": reading.chat, "text": reading.text}
    found = f"?{urlencode(asked, quote_via=quote)}"
    return found if len(found) <= ADDRESS else "?tab=explore"


def values_of(seen: TokenFeatures, layer: int, feature: int) -> Float[np.ndarray, " tokens"]:
    """The activation of one feature on every token of the text."""
    return seen.of(0, layer).select([feature])[:, 0].float().numpy()


def tokens_panel(seen: TokenFeatures, reading: Reading, label: Label) -> Markup:
    """The text as chips, shaded by the chosen feature; each picks its token, and those that do not count are marked."""
    values = values_of(seen, reading.layer, reading.feature) if reading.feature >= 0 else np.zeros(len(seen.tokens[0]))
    counts, left_out = seen.counts(0, reading.layer).numpy(), seen.left_out(0, reading.layer)
    top = largest(values, counts)
    made = [
        chip(
            token,
            float(value),
            top,
            pick=f"token:{i}",
            pressed=i == reading.token,
            title=f"token {i}: {number(float(value))}" if value > 0 else f"token {i}",
            left_out=left_out[i],
        )
        for i, (token, value) in enumerate(zip(seen.tokens[0], values, strict=True))
    ]
    if reading.feature < 0:
        note: Markup = element("span", "pick a feature to see where it fires")
    else:
        named = name_of(label(reading.layer, reading.feature))
        where = f"fires on {int((values[counts] > 0).sum())} of {int(counts.sum())} tokens"
        number_of = element("b", f"feature {reading.feature}", class_="qs-id")
        note = join(
            number_of, " ", named, " ", where, " ", scale(number(top)), " ",
            feature_link(reading.layer, reading.feature),
        )  # fmt: skip
    link = element("span", hidden=True, data_address=address(reading))
    title = heading(f"{len(seen.tokens[0])} tokens", note)
    return card(title, chips(made, "Tokens of the text"), left_out_note(seen) or Markup(""), link)


def largest(values: Float[np.ndarray, " tokens"], counts: Bool[np.ndarray, " tokens"]) -> float:
    """The top of a shading: the largest value on tokens that count, so that a sink does not make all others pale."""
    return float(values[counts].max(initial=0.0)) or float(values.max(initial=0.0))


def ranked_row(
    layer: int, feature: int, value: float, top: float, pressed: bool, label: Label, remark: str = ""
) -> Markup:
    """One feature of a ranking; it picks its feature."""
    inside = (
        element("span", feature, class_="qs-id"),
        element("span", name_of(label(layer, feature)), class_="qs-name"),
        bar(value, top),
        element("span", number(value), class_="qs-value"),
        element("span", remark, class_="qs-remark") if remark else None,
    )
    button = element(
        "button", *inside, type="button", class_="qs-row", data_pick=f"feature:{feature}",
        aria_pressed=str(pressed).lower(), title=f"Where feature {feature} fires",
    )  # fmt: skip
    return element("li", button, feature_link(layer, feature))


def token_pairs(seen: TokenFeatures, layer: int, token: int, n: int) -> list[tuple[int, float]]:
    """The strongest features of a token with their activations."""
    acts = seen.of(0, layer)[token]
    pairs = zip(acts.indices.tolist(), acts.values.float().tolist(), strict=True)
    return [(feature, value) for feature, value in pairs if value > 0][:n]


def depth_features(seen: TokenFeatures, layer: int, token: int) -> list[int]:
    """The features of a token that are shown at each layer."""
    return [feature for feature, _ in token_pairs(seen, layer, token, DEPTH_FEATURES)]


def shown_features(seen: TokenFeatures, reading: Reading) -> list[int]:
    """All features that the panels of a reading name."""
    of_token = [feature for feature, _ in token_pairs(seen, reading.layer, reading.token, RANKED)]
    of_text = [one.feature for one in seen.strongest(0, reading.layer, RANKED)]
    rows = [one.feature for one in heat_features(seen, reading.layer)]
    return [*of_token, *of_text, *rows, *([reading.feature] if reading.feature >= 0 else [])]


def token_features_panel(seen: TokenFeatures, reading: Reading, label: Label) -> Markup:
    """The strongest features of the chosen token."""
    pairs = token_pairs(seen, reading.layer, reading.token, RANKED)
    top = max((v for _, v in pairs), default=0.0)
    rows = [ranked_row(reading.layer, f, v, top, f == reading.feature, label) for f, v in pairs]
    said = (why := seen.left_out(0, reading.layer)[reading.token]) and f" · left out: {why}"
    title = heading("This token", join("token ", reading.token, " ", quoted(seen.tokens[0][reading.token]), said))
    return card(title, element("ol", *rows, class_="qs-ranking", data_roving=True))


def text_features_panel(seen: TokenFeatures, reading: Reading, label: Label) -> Markup:
    """The strongest features of the whole text, on its tokens that count."""
    best = seen.strongest(0, reading.layer, RANKED)
    top = max((one.maximum for one in best), default=0.0)
    rows = [
        ranked_row(
            reading.layer, one.feature, one.maximum, top, one.feature == reading.feature, label, percent(one.rate)
        )
        for one in best
    ]
    title = heading("Whole text", "largest activation · share of tokens")
    return card(title, element("ol", *rows, class_="qs-ranking", data_roving=True))


def heat_features(seen: TokenFeatures, layer: int) -> list[Strongest]:
    """The rows of the heat map: the features of the largest mean activation on tokens that count."""
    return sorted(seen.strongest(0, layer), key=lambda one: (-one.mean, one.feature))[:HEAT_ROWS]


def heat_panel(seen: TokenFeatures, reading: Reading, label: Label) -> Markup:
    """Features by tokens, with the switches that say how."""
    left_out, counts = seen.left_out(0, reading.layer), seen.counts(0, reading.layer).numpy()
    shown = np.flatnonzero(counts) if reading.only_counted else np.arange(len(counts))
    best = heat_features(seen, reading.layer)
    switches = element(
        "div",
        switch("each row by its own maximum", "own:0", reading.own_scale),
        switch("only tokens that count", "counted:0", reading.only_counted),
        class_="qs-switches",
    )
    if not best:
        why = "No feature is active here." if counts.any() else "No token of this text counts."
        return card(heading("Heat map"), switches, element("p", why, class_="qs-note"))
    values = seen.of(0, reading.layer).select([one.feature for one in best]).float().numpy()
    highest = float(values[counts].max())
    tokens = [
        element(
            "th",
            element("span", visible(seen.tokens[0][i]) or "·", dir="auto"),
            scope="col",
            title=f"token {i}" + (f" · left out: {left_out[i]}" if left_out[i] else ""),
            class_="qs-left-out" if left_out[i] else None,
        )
        for i in shown.tolist()
    ]
    rows = []
    for j, one in enumerate(best):
        top = one.maximum if reading.own_scale else highest
        button = element(
            "button", one.feature, type="button", data_pick=f"feature:{one.feature}", class_="qs-id",
            aria_pressed=str(one.feature == reading.feature).lower(),
        )  # fmt: skip
        cells = [
            element("td", style=strength(v, top), title=f"{number(v)} at token {i}" if v else None)
            for i, v in zip(shown.tolist(), values[shown, j].tolist(), strict=True)
        ]
        inside = element("div", button, name_of(label(reading.layer, one.feature)), class_="qs-beside")
        rows.append(element("tr", element("th", inside, scope="row"), *cells))
    top = "each row's maximum" if reading.own_scale else number(highest)
    note = join("rows by mean activation ", scale(top))
    head = element("tr", element("th", "feature", scope="col"), *tokens)
    table = element(
        "table", element("thead", head), element("tbody", *rows), class_="qs-heat", style=f"--n:{len(shown)}"
    )
    region = element(
        "div", table, class_="qs-scroll", tabindex=0, data_roving=True, role="group", aria_label="Heat map"
    )
    return card(heading("Heat map", note), switches, region)


def token_depth_panel(seen: Mapping[int, TokenFeatures], reading: Reading, label: Label) -> Markup:
    """The chosen token through depth: its strongest features at every layer."""
    rows = []
    for layer, found in sorted(seen.items()):
        pairs = token_pairs(found, layer, reading.token, DEPTH_FEATURES)
        top = max((v for _, v in pairs), default=0.0)
        cells = [
            element(
                "td",
                element(
                    "a", element("b", f), name_of(label(layer, f)), element("span", number(v), class_="qs-value"),
                    href=f"?layer={layer}&feature={f}", class_="qs-depth", style=strength(v, top),
                ),
            )
            for f, v in pairs
        ]  # fmt: skip
        here = "qs-here" if layer == reading.layer else None
        rows.append(element("tr", element("th", f"layer {layer}", scope="row"), *cells, class_=here))
    token = element(
        "span", visible(next(iter(seen.values())).tokens[0][reading.token]) or "·", class_="qs-token qs-quiet"
    )
    return card(
        heading("This token through depth", join("token ", reading.token, " ", token)),
        element("div", element("table", element("tbody", *rows), class_="qs-table qs-fixed"), class_="qs-scroll"),
    )


def feature_depth_panel(
    seen: Mapping[int, TokenFeatures], near: Mapping[int, Neighbour | None], reading: Reading, label: Label
) -> Markup:
    """The neighbourhood of the chosen feature through depth: what is nearest to it at every layer, on this text."""
    rows = []
    for layer, one in sorted(near.items()):
        if one is None:
            continue
        values = values_of(seen[layer], layer, one.feature)
        link = element("a", one.feature, href=f"?layer={layer}&feature={one.feature}", class_="qs-near qs-id")
        cells = (
            element("th", f"layer {layer}", scope="row"),
            element("td", element("div", link, name_of(label(layer, one.feature)), class_="qs-beside")),
            element("td", number(one.cosine or 0.0), class_="qs-figure qs-value"),
            element("td", strip(seen[layer].tokens[0], values), class_="qs-wide"),
            element("td", number(float(values.max())), class_="qs-figure qs-value"),
        )
        rows.append(element("tr", *cells, class_="qs-here" if layer == reading.layer else None))
    note = "per layer the feature of the nearest direction, its cosine, and where it fires in this text"
    table = element("table", element("tbody", *rows), class_="qs-table qs-fixed qs-around")
    return (
        card(heading(f"Around feature {reading.feature} of layer {reading.layer}", note), table) if rows else Markup("")
    )


def strip(tokens: Sequence[str], values: Float[np.ndarray, " tokens"]) -> Markup:
    """A text as a thin strip of cells, one per token."""
    top = float(values.max()) if len(values) else 0.0
    cells = [
        element("i", style=strength(float(v), top), title=f"{visible(t)}: {number(float(v))}" if v > 0 else visible(t))
        for t, v in zip(tokens, values, strict=True)
    ]
    return element("span", *cells, class_="qs-strip", aria_hidden="true")

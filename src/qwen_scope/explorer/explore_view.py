"""What the Explore tab shows, as markup: tokens, ranked features, the heat map, the text through depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import quote, urlencode

import numpy as np
from jaxtyping import Float

from qwen_scope.features import Neighbour
from qwen_scope.report import Markup, element, join, visible
from qwen_scope.scope import TokenFeatures

from .components import Named, bar, card, chip, chips, feature_link, heading, name_of, number, percent, quoted, strength

RANKED = 12
HEAT_ROWS = 24
DEPTH_FEATURES = 5

ADDRESS = 2000
"""Characters of an address that every browser and proxy lets through."""

Label = Callable[[int, int], Named | None]


@dataclass(frozen=True)
class Reading:
    """What one visitor looks at: a text, how it is put to the model, a layer, a token and a feature (-1: none)."""

    text: str
    chat: str
    layer: int
    token: int = -1
    feature: int = -1

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
    """The text as chips, shaded by the chosen feature; each picks its token."""
    values = values_of(seen, reading.layer, reading.feature) if reading.feature >= 0 else np.zeros(len(seen.tokens[0]))
    top = float(values.max())
    made = [
        chip(
            token,
            float(value),
            top,
            pick=f"token:{i}",
            pressed=i == reading.token,
            title=f"token {i}: {number(float(value))}" if value > 0 else f"token {i}",
        )
        for i, (token, value) in enumerate(zip(seen.tokens[0], values, strict=True))
    ]
    if reading.feature < 0:
        note: Markup = element("span", "pick a feature to see where it fires")
    else:
        named = name_of(label(reading.layer, reading.feature))
        legend = element("span", class_="qs-legend", aria_hidden="true")
        scale = element("span", "0 ", legend, " ", number(top), class_="qs-scale")
        where = f"fires on {int((values > 0).sum())} of {len(values)} tokens"
        note = join(
            element("b", f"feature {reading.feature}", class_="qs-id"), " ", named, " ", where, " ", scale, " ",
            feature_link(reading.layer, reading.feature),
        )  # fmt: skip
    link = element("span", hidden=True, data_address=address(reading))
    return card(heading(f"{len(seen.tokens[0])} tokens", note), chips(made, "Tokens of the text"), link)


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


def token_features_panel(seen: TokenFeatures, reading: Reading, label: Label) -> Markup:
    """The strongest features of the chosen token."""
    acts = seen.of(0, reading.layer)[reading.token]
    values, features = acts.values.float().tolist(), acts.indices.tolist()
    pairs = [(f, v) for f, v in zip(features, values, strict=True) if v > 0][:RANKED]
    top = max((v for _, v in pairs), default=0.0)
    rows = [ranked_row(reading.layer, f, v, top, f == reading.feature, label) for f, v in pairs]
    title = heading("This token", join("token ", reading.token, " ", quoted(seen.tokens[0][reading.token])))
    return card(title, element("ol", *rows, class_="qs-ranking", data_roving=True))


def text_features_panel(seen: TokenFeatures, reading: Reading, label: Label) -> Markup:
    """The strongest features of the whole text."""
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


def heat_panel(seen: TokenFeatures, reading: Reading, label: Label, *, own_scale: bool, skip_first: bool) -> Markup:
    """Features by tokens. Rows are the features of the largest mean activation.

    Args:
        own_scale: shade each row by its own maximum instead of the whole map's.
        skip_first: leave out the first token, whose residual is often huge.
    """
    first = 1 if skip_first and len(seen.tokens[0]) > 1 else 0
    best = seen.strongest(0, reading.layer, tokens=slice(first, None))
    best = sorted(best, key=lambda one: (-one.mean, one.feature))[:HEAT_ROWS]
    if not best:
        return card(heading("Heat map"), element("p", "No feature is active here.", class_="qs-note"))
    values = seen.of(0, reading.layer).select([one.feature for one in best]).float().numpy()[first:]
    tokens = seen.tokens[0][first:]
    head = element(
        "tr",
        element("th", "feature", scope="col"),
        *(
            element("th", element("span", visible(t) or "·", dir="auto"), scope="col", title=f"token {first + i}")
            for i, t in enumerate(tokens)
        ),
    )
    rows = []
    for j, one in enumerate(best):
        top = one.maximum if own_scale else float(values.max())
        button = element(
            "button", one.feature, type="button", data_pick=f"feature:{one.feature}", class_="qs-id",
            aria_pressed=str(one.feature == reading.feature).lower(),
        )  # fmt: skip
        cells = [
            element(
                "td", style=strength(float(v), top), title=f"{number(float(v))} at token {first + i}" if v else None
            )
            for i, v in enumerate(values[:, j].tolist())
        ]
        rows.append(
            element("tr", element("th", button, name_of(label(reading.layer, one.feature)), scope="row"), *cells)
        )
    note = "rows by mean activation; " + ("each scaled by its own maximum" if own_scale else "one scale for all")
    table = element("table", element("thead", head), element("tbody", *rows), class_="qs-heat")
    return card(heading("Heat map", note), element("div", table, class_="qs-scroll", tabindex=0, data_roving=True))


def token_depth_panel(seen: Mapping[int, TokenFeatures], reading: Reading, label: Label) -> Markup:
    """The chosen token through depth: its strongest features at every layer."""
    rows = []
    for layer, found in sorted(seen.items()):
        acts = found.of(0, layer)[reading.token]
        pairs = list(zip(acts.indices.tolist(), acts.values.float().tolist(), strict=True))[:DEPTH_FEATURES]
        top = max((v for _, v in pairs), default=0.0)
        cells = [
            element(
                "td",
                element(
                    "a", f, " ", name_of(label(layer, f)), element("span", number(v), class_="qs-value"),
                    href=f"?layer={layer}&feature={f}", class_="qs-depth", style=strength(v, top),
                ),
            )
            for f, v in pairs if v > 0
        ]  # fmt: skip
        here = "qs-here" if layer == reading.layer else None
        rows.append(element("tr", element("th", f"layer {layer}", scope="row"), *cells, class_=here))
    token = element(
        "span", visible(next(iter(seen.values())).tokens[0][reading.token]) or "·", class_="qs-token qs-quiet"
    )
    return card(
        heading("This token through depth", join("token ", reading.token, " ", token)),
        element("div", element("table", element("tbody", *rows), class_="qs-table"), class_="qs-scroll"),
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
            element("td", link, " ", name_of(label(layer, one.feature))),
            element("td", number(one.cosine or 0.0), class_="qs-figure qs-value"),
            element("td", strip(seen[layer].tokens[0], values), class_="qs-wide"),
            element("td", number(float(values.max())), class_="qs-figure qs-value"),
        )
        rows.append(element("tr", *cells, class_="qs-here" if layer == reading.layer else None))
    note = "per layer the feature of the nearest direction, its cosine, and where it fires in this text"
    table = element("table", element("tbody", *rows), class_="qs-table")
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

"""What the Compare tab shows, as markup: two sides as chips, and the features that tell them apart."""

from __future__ import annotations

import json
from collections.abc import Sequence

from qwen_scope.report import Markup, element, join
from qwen_scope.scope import Comparison, TokenFeatures

from .components import card, chip, feature_link, heading, left_out_note, name_of, percent, strength
from .explore import Label

SHOWN_TEXTS = 12

Texts = Sequence[int]


def shading(seen: TokenFeatures, sides: tuple[Texts, Texts], layer: int, feature: int) -> dict[str, list]:
    """Per side the chips that a feature shades: `[place among the side's chips, share of the maximum]`.

    The maximum is that of the tokens that count; others may be at it too.
    """
    found: dict[str, list] = {}
    top = highest = 0.0
    for name, texts in zip("ab", sides, strict=True):
        found[name], at = [], 0
        for text in texts:
            values = seen.of(text, layer).select([feature])[:, 0].float().numpy()
            found[name] += [[at + i, v] for i, v in enumerate(values.tolist()) if v > 0]
            top = max(top, float(values[seen.counts(text, layer).numpy()].max(initial=0.0)))
            highest = max(highest, float(values.max()))
            at += len(values)
    top = top or highest
    return {name: [[i, round(min(1.0, v / top), 3)] for i, v in pairs] for name, pairs in found.items()}


def side_panel(seen: TokenFeatures, texts: Texts, side: str, shares: Sequence[Sequence[float]], total: int) -> Markup:
    """One side as chips, shaded to begin with."""
    by_place = {int(i): v for i, v in shares}
    rows, at = [], 0
    for text in texts:
        tokens, why = seen.tokens[text], left_out_at(seen, text)
        made = [chip(token, by_place.get(at + i, 0.0), 1.0, left_out=why[i]) for i, token in enumerate(tokens)]
        rows.append(element("div", *made, class_="qs-tokens", dir="auto"))
        at += len(tokens)
    more = f"the first {len(texts)} of {total} texts" if total > len(texts) else f"{at} tokens"
    mark = element("span", side.upper(), class_=f"qs-side qs-side-{side}")
    return card(heading("", join(mark, " ", more)), element("div", *rows, data_side=side, class_="qs-texts"))


def left_out_at(seen: TokenFeatures, text: int) -> list[str]:
    """Per token of a text why it does not count: `first`, or `sink at layers 2, 3` where it counts at others."""
    out = []
    for whys in zip(*(seen.left_out(text, layer) for layer in seen.layers), strict=True):
        parts = []
        for why in dict.fromkeys(filter(None, whys)):
            layers = [layer for layer, one in zip(seen.layers, whys, strict=True) if one == why]
            at = f" at layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
            parts.append(why if len(layers) == len(seen.layers) else why + at)
        out.append("; ".join(parts))
    return out


def difference_bar(one: Comparison, top: float) -> Markup:
    """A bar to the left where side A has the higher rate, to the right where B has."""
    side = "a" if one.difference > 0 else "b"
    filled = element("span", class_=f"qs-fill-{side}", style=strength(abs(one.difference), top))
    halves = (filled, None) if side == "a" else (None, filled)
    return element("span", *(element("span", half) for half in halves), class_="qs-difference", aria_hidden="true")


def ranking_panel(
    found: dict[int, list[Comparison]], seen: TokenFeatures, sides: tuple[Texts, Texts], label: Label
) -> Markup:
    """Per layer the features that differ most; hovering or focusing a row shades both sides by its feature."""
    rows = []
    first = True
    for layer, ranked in found.items():
        rows.append(element("tr", element("th", f"layer {layer}", colspan=5, scope="rowgroup"), class_="qs-group"))
        top = max((abs(one.difference) for one in ranked), default=0.0)
        for one in ranked:
            data = json.dumps(shading(seen, sides, layer, one.feature), separators=(",", ":"))
            side = "A" if one.difference > 0 else "B"
            cells = (
                element("td", element("div", element("button", one.feature, type="button", class_="qs-id qs-plain"),
                                      name_of(label(layer, one.feature)), class_="qs-beside")),
                element("td", percent(one.rate_a), class_="qs-figure"),
                element("td", difference_bar(one, top)),
                element("td", percent(one.rate_b), class_="qs-figure"),
                element("td", f"{side} +{percent(abs(one.difference))}", class_="qs-figure qs-value"),
                element("td", feature_link(layer, one.feature)),
            )  # fmt: skip
            rows.append(element("tr", *cells, data_shade=data, class_="qs-shading" if first else None))
            first = False
    head = element(
        "tr",
        *(element("th", text, scope="col", class_=kind) for text, kind in (
            ("feature", None), ("rate in A", "qs-figure"), ("higher in", "qs-middle"), ("rate in B", "qs-figure"),
            ("difference", "qs-figure"), ("", None),
        )),
    )  # fmt: skip
    table = element(
        "table", element("thead", head), element("tbody", *rows, data_roving=True), class_="qs-table qs-ranked"
    )
    return card(
        heading("What tells them apart", "rate: share of the tokens that count on which a feature is active"),
        left_out_note(seen) or Markup(""),
        element("div", table, class_="qs-scroll", data_shading=True),
    )


def compared(
    found: dict[int, list[Comparison]], seen: TokenFeatures, first: int, label: Label
) -> tuple[Markup, Markup, Markup]:
    """Side A, side B, and the ranking."""
    total = len(seen.texts)
    sides = (range(min(first, SHOWN_TEXTS)), range(first, min(total, first + SHOWN_TEXTS)))
    best = next((one for ranked in found.values() for one in ranked), None)
    shares = shading(seen, sides, best.layer, best.feature) if best else {"a": [], "b": []}
    return (
        side_panel(seen, sides[0], "a", shares["a"], first),
        side_panel(seen, sides[1], "b", shares["b"], total - first),
        ranking_panel(found, seen, sides, label),
    )

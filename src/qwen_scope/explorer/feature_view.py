"""What the Feature tab shows, as markup: all about one feature, as `features.feature_page` gathered it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from qwen_scope.features import FeaturePage, Label, Neighbour, TokenEffect, label_text, page_facts
from qwen_scope.report import Markup, element, join, marks_note, visible
from qwen_scope.store import Context
from qwen_scope.trust import HELD, Card, card_tables

from .components import bar, card, chip, heading, name_of, number
from .explore_view import Label as LabelOf

Shown = FeaturePage


def title_panel(page: FeaturePage, address: str) -> Markup:
    """Which feature, what it is called, whether it is causal; and a link to this page."""
    copy = element("button", "Copy link", type="button", class_="qs-copy", data_copy=address)
    verdict = None
    if page.verdict is not None:
        reasons = [element("li", visible(str(reason))) for reason in page.verdict.get("reasons", ())]
        outcome = element("b", visible(str(page.verdict.get("outcome"))))
        verdict = element("div", join("Verdict: ", outcome), element("ul", *reasons), class_="qs-verdict")
    return card(
        element(
            "div",
            element("h2", f"Feature {page.feature}", element("small", f"layer {page.layer}")),
            copy,
            class_="qs-title",
        ),
        element("p", label_of(page.label), class_="qs-lead"),
        verdict or Markup(""),
        element("span", hidden=True, data_address=address),
    )


def weighing_panel() -> Markup:
    """What stands in the place of the card until it is there."""
    return card(heading("How far to trust it"), element("p", "measuring …", class_="qs-note"))


def trust_panel(found: Card) -> Markup:
    """The card: the word, the rules behind it, what is known to be wrong, what was measured, and what was not."""
    rules = [element("li", element("b", HELD[held]), " ", rule) for rule, held in found.trust.reasons]
    wrong = [element("p", f"Known failure: {visible(one)}.") for one in found.failures]
    measured = [measured_table(*one) for one in card_tables(found)]
    missing = [element("li", visible(one)) for one in found.missing]
    return card(
        heading("How far to trust it"),
        element("p", element("b", found.trust.word), class_="qs-lead", data_word=found.trust.word),
        element("ul", *rules, class_="qs-rules"),
        *wrong,
        element("details", element("summary", "What was measured"), *measured) if measured else Markup(""),
        element("details", element("summary", "What was not measured"), element("ul", *missing)),
    )


def measured_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | int | float | None]]) -> Markup:
    """One measurement; wide ones scroll by themselves."""
    head = element("tr", *(element("th", column) for column in columns)) if any(columns) else Markup("")
    body = [element("tr", *(element("td", cell(value)) for value in row)) for row in rows]
    return element("div", heading(visible(title)), element("table", head, *body, class_="qs-table"), class_="qs-scroll")


def cell(value: str | int | float | None) -> str:
    """A figure or a word of a table."""
    if value is None:
        return "–"
    return number(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else visible(value)


def label_of(label: Label | None) -> str:
    """A label with its scores, or what to do to get one."""
    return label_text(label) if label is not None else "No label yet; qwen-scope label writes and scores one."


def facts_panel(page: FeaturePage) -> Markup:
    """How often and how strongly it fires, with the histogram of its activations."""
    facts = [
        join(element("dt", name), element("dd", f"{value:,}" if isinstance(value, int) else number(value)))
        for name, value in page_facts(page)
    ]
    shown = [heading("How often and how strongly"), element("dl", *facts, class_="qs-facts-list")]
    if page.histogram is not None and page.histogram.counts.any():
        shown.append(histogram(page.histogram.edges.tolist(), page.histogram.counts.tolist()))
    return card(*shown)


def histogram(edges: Sequence[float], counts: Sequence[int]) -> Markup:
    """Bars as high as the square root of their count, so that rare strong values show."""
    top = max(counts) ** 0.5
    bars = [
        element("i", style=f"--v:{count**0.5 / top:.3f}", title=f"{number(low)} to {number(high)}: {count:,}")
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    axis = (
        element("span", "0"),
        element("span", "activation; heights are square roots"),
        element("span", number(edges[-1])),
    )
    return join(
        element("div", *bars, class_="qs-histogram", role="img", aria_label="histogram of the activations"),
        element("div", *axis, class_="qs-axis"),
    )


def contexts_panel(title: str, note: str, contexts: Sequence[Context], maximum: float) -> Markup:
    """Places where it fires, shaded by one scale."""
    rows = []
    for context in contexts:
        place = element("span", number(context.value), class_="qs-value", title=context.place)
        phase = element("small", f"{context.phase}: ", class_="qs-note") if context.phase not in ("", "text") else None
        made = passage(context.tokens, context.values, maximum, context.left_out)
        rows.append(element("li", place, element("div", phase, *made, class_="qs-tokens qs-small", dir="auto")))
    said = marks_note((reason for context in contexts for reason in context.left_out), "A dashed frame")
    marks = element("p", said, class_="qs-note") if said else Markup("")
    return card(heading(title, note), element("ol", *rows, class_="qs-contexts"), marks)


def passage(
    tokens: Sequence[str], values: Sequence[float], maximum: float, left_out: Sequence[str] = ()
) -> list[Markup]:
    """A text whose firing tokens are shaded chips, as are those that do not count; the rest is read as one piece.

    Args:
        left_out: per token why it does not count, "" where it does.
    """
    made: list[Markup] = []
    reasons = left_out or [""] * len(tokens)
    for alone, group in groupby(zip(tokens, values, reasons, strict=True), lambda one: one[1] > 0 or bool(one[2])):
        if alone:
            made += [
                chip(token, value, maximum, title=number(value) if value > 0 else None, left_out=reason)
                for token, value, reason in group
            ]
            continue
        lines = "".join(visible(token) + ("\0" if "\n" in token else "") for token, *_ in group).split("\0")
        pieces = [part for line in lines for part in (element("br"), line)][1:]
        made.append(element("bdi", *pieces, class_="qs-silent"))
    return made


def effects_panel(page: FeaturePage) -> Markup:
    """Tokens it makes likelier and less likely, directly and where a lens is at hand through later layers."""
    shown = [("Promotes", None, page.promoted), ("Demotes", None, page.demoted)]
    if page.lens is not None:
        note = f"Jacobian lens; peak {page.lens.peak:.1f} sd, above {page.lens.beaten:.0%} of random directions"
        shown += [("Disposes to say", note, page.lens.promoted)]
    sides = [element("div", heading(name, note), effect_list(effects)) for name, note, effects in shown]
    return card(element("div", *sides, class_="qs-halves"))


def effect_list(effects: Sequence[TokenEffect]) -> Markup:
    """Tokens with their change of logit."""
    top = max((abs(one.effect) for one in effects), default=1.0)
    rows = [
        element("li", chip(one.text), bar(abs(one.effect), top), element("span", number(one.effect), class_="qs-value"))
        for one in effects
    ]
    return element("ol", *rows, class_="qs-effects")


def neighbours_panel(page: FeaturePage, label: LabelOf, *, searching: bool = False) -> Markup:
    """Features near it, by direction, by firing, and in other layers; `searching` says that the latter two follow."""
    groups = (
        ("Of like direction", "cosine", page.similar),
        ("On the same tokens", "Jaccard", page.cofiring),
        ("In other layers", "cosine", page.elsewhere),
    )
    shown = [element("div", heading(name, unit), neighbour_list(some, label)) for name, unit, some in groups if some]
    if searching:
        shown.append(element("div", heading("On the same tokens"), element("p", "counting …", class_="qs-note")))
    return card(element("div", *shown, class_="qs-halves")) if shown else Markup("")


def neighbour_list(some: Sequence[Neighbour], label: LabelOf) -> Markup:
    """Links to the features, with how near they are."""
    rows = []
    for one in some:
        near = one.cosine if one.cosine is not None else one.jaccard
        link = element(
            "a", f"{one.layer} / ", element("b", one.feature), " ", name_of(label(one.layer, one.feature)),
            href=f"?layer={one.layer}&feature={one.feature}", class_="qs-near",
        )  # fmt: skip
        figures = number(near) if near is not None else None
        rows.append(element("li", link, bar(max(0.0, near or 0.0), 1.0), element("span", figures, class_="qs-value")))
    return element("ol", *rows, class_="qs-effects")


def notes_panel(page: FeaturePage) -> Markup:
    """What has been written about it."""
    notes = [note for note in page.notes if note.kind == "note"]
    rows = [
        element(
            "li", element("p", visible(str(note.body.get("text", ""))), dir="auto"),
            element("small", f"{visible(note.author) or 'no name'}, {note.made[:10]}"),
        )
        for note in notes
    ]  # fmt: skip
    return element("ol", *rows, class_="qs-notes") if rows else Markup("")

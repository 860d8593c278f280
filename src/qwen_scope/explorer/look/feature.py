"""What the Feature tab shows, as markup: all about one feature, as `features.feature_page` gathered it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from qwen_scope.features import FeaturePage, Neighbour, TokenEffect, label_text, page_facts
from qwen_scope.report import Markup, element, join, marks_note, visible, word_start
from qwen_scope.store import Context
from qwen_scope.trust import HELD, Card, card_tables

from .components import act, bar, card, chip, heading, name_of, number, scale
from .explore import Label as LabelOf


def title_panel(page: FeaturePage, address: str) -> Markup:
    """Which feature, what it is called, whether it is causal; what to do with it, and a link to this page."""
    copy = element("button", "Copy link", type="button", class_="qs-copy", data_copy=address)
    steer = act("Steer with this", "steer:0", "Opens Steer with this feature")
    why = act("Why", "why:0", "Opens Why with this feature's activation as the question")
    verdict = None
    if page.verdict is not None:
        reasons = [element("li", visible(str(reason))) for reason in page.verdict.get("reasons", ())]
        outcome = element("b", visible(str(page.verdict.get("outcome"))))
        verdict = element("div", join("Verdict: ", outcome), element("ul", *reasons), class_="qs-verdict")
    return card(
        element(
            "div",
            element("h2", f"Feature {page.feature}", element("small", f"layer {page.layer}")),
            element("div", steer, why, copy, class_="qs-acts"),
            class_="qs-title",
        ),
        element("p", label_of(page), class_="qs-lead"),
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


def label_of(page: FeaturePage) -> str:
    """A label with its scores; without one what it promotes, and what to do to get one."""
    if page.label is not None:
        return label_text(page.label)
    words = " · ".join(visible(one.text).strip() or repr(one.text) for one in page.promoted[:5])
    said = f"No label yet; it promotes {words}. " if words else "No label yet; "
    return said + "qwen-scope label writes and scores one."


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


def contexts_panel(
    title: str, note: str, contexts: Sequence[Context], maximum: float, *, switched: Markup | None = None
) -> Markup:
    """Places where it fires, shaded by one scale, each from the beginning of a word on.

    Args:
        switched: a switch between passages and whole documents, which then scroll by themselves.
    """
    rows = []
    for context in contexts:
        at = context.position - context.start
        token = chip(context.tokens[at], context.value, maximum, class_="qs-peak")
        place = element(
            "span", element("span", number(context.value), class_="qs-value"), token, class_="qs-place",
            title=context.place,
        )  # fmt: skip
        phase = element("small", f"{context.phase}: ", class_="qs-note") if context.phase not in ("", "text") else None
        begin = word_start(context.tokens, at, at_start=context.start == 0)
        cut = element("span", "… ", class_="qs-note") if context.start + begin > 0 else None
        made = passage(
            context.tokens[begin:], context.values[begin:], maximum, context.left_out[begin:], peak=at - begin
        )
        text = element("div", phase, cut, *made, class_="qs-tokens qs-small", dir="auto")
        rows.append(element("li", place, text))
    said = marks_note((reason for context in contexts for reason in context.left_out), "A dashed frame")
    marks = element("p", said, class_="qs-note") if said else Markup("")
    shown = join(note, " · the framed token is the place ", scale(number(maximum)))
    body = element("ol", *rows, class_="qs-contexts")
    return card(heading(title, shown), switched or Markup(""), body, marks)


def whole_panel(contexts: Sequence[Context], maximum: float, switched: Markup) -> Markup:
    """The documents in which it is strongest, whole; each scrolls by itself, and begins at its strongest place."""
    rows = []
    for context in contexts:
        peak = context.position - context.start
        fires = sum(value > 0 for value in context.values)
        said = f"document {context.document} · fires on {fires} of {len(context.tokens)} tokens · {context.value:.3g}"
        made = passage(context.tokens, context.values, maximum, context.left_out, peak=peak)
        cut = element("span", "… ", class_="qs-note") if context.start else None
        text = element(
            "div", cut, *made, class_="qs-tokens qs-small qs-whole", dir="auto", tabindex=0, role="group",
            aria_label=f"Document {context.document}",
        )  # fmt: skip
        rows.append(element("li", element("p", said, class_="qs-note"), text, class_="qs-document"))
    note = join("the framed token is the strongest place ", scale(number(maximum)))
    return card(heading("Whole documents", note), switched, element("ol", *rows, class_="qs-contexts"))


def passage(
    tokens: Sequence[str],
    values: Sequence[float],
    maximum: float,
    left_out: Sequence[str] = (),
    *,
    peak: int = -1,
) -> list[Markup]:
    """A text whose firing tokens are shaded chips, as are those that do not count; the rest is read as one piece.

    Args:
        left_out: per token why it does not count, "" where it does.
        peak: the token that the passage is shown for, which is framed.
    """
    made: list[Markup] = []
    reasons = left_out or [""] * len(tokens)
    every = enumerate(zip(tokens, values, reasons, strict=True))
    for alone, group in groupby(every, lambda one: one[1][1] > 0 or bool(one[1][2])):
        if alone:
            made += [
                chip(token, value, maximum, title=number(value) if value > 0 else None, left_out=reason,
                     class_="qs-peak" if i == peak else "")
                for i, (token, value, reason) in group
            ]  # fmt: skip
            continue
        lines = "".join(visible(token) + ("\0" if "\n" in token else "") for _, (token, *_) in group).split("\0")
        pieces = [part for line in lines for part in (element("br"), line)][1:]
        made.append(element("bdi", *pieces, class_="qs-silent"))
    return made


def effects_panel(page: FeaturePage) -> Markup:
    """Tokens it makes likelier and less likely, directly and where a lens is at hand through later layers."""
    shown = [
        ("Promotes", "tokens it makes likelier, by logit", page.promoted),
        ("Demotes", "tokens it makes less likely", page.demoted),
    ]
    if page.lens is not None:
        note = f"Jacobian lens; peak {page.lens.peak:.1f} sd, above {page.lens.beaten:.0%} of random directions"
        shown += [("Disposes to say", note, page.lens.promoted)]
    sides = [element("div", heading(name, note), effect_list(effects)) for name, note, effects in shown]
    return card(element("div", *sides, class_="qs-halves"))


def effect_list(effects: Sequence[TokenEffect]) -> Markup:
    """Tokens with their change of logit; those below zero have hatched bars that grow leftwards."""
    top = max((abs(one.effect) for one in effects), default=1.0)
    rows = [
        element(
            "li", chip(one.text), bar(abs(one.effect), top, "prob" if one.effect >= 0 else "less"),
            element("span", f"{'+' if one.effect >= 0 else '−'}{number(abs(one.effect))}", class_="qs-value"),
        )
        for one in effects
    ]  # fmt: skip
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
    return card(element("div", *shown, class_="qs-stack")) if shown else Markup("")


def neighbour_list(some: Sequence[Neighbour], label: LabelOf) -> Markup:
    """Links to the features, with how near they are."""
    rows = []
    for one in some:
        near = one.cosine if one.cosine is not None else one.jaccard
        link = element(
            "a", element("span", f"{one.layer} / ", element("b", one.feature)), name_of(label(one.layer, one.feature)),
            href=f"?layer={one.layer}&feature={one.feature}", class_="qs-near qs-beside",
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

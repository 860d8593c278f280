"""A feature's page as one HTML file."""

from __future__ import annotations

from qwen_scope.errors import printable
from qwen_scope.report import Markup, element, html_bars, html_page, html_table, html_tokens, join, marks_note, visible
from qwen_scope.store import Context

from .effects import TokenEffect
from .neighbours import Neighbour
from .notes import Label
from .show import FeaturePage


def feature_html(page: FeaturePage) -> str:
    """A self-contained document: it opens from a folder, runs no script and asks nothing of the network."""
    return html_page(f"Layer {page.layer}, feature {page.feature}", *page_parts(page))


def page_parts(page: FeaturePage) -> list[Markup]:
    """What the page consists of, its heading first."""
    parts = [
        element("h1", f"Layer {page.layer}, feature {page.feature}"),
        element("p", f"{printable(page.group)}, {printable(page.model)}", class_="place"),
        element("p", label_text(page.label)),
    ]
    if page.verdict is not None:
        parts.append(element("p", f"Verdict: {printable(str(page.verdict.get('outcome')))}"))
        parts += [element("p", printable(str(reason)), class_="place") for reason in page.verdict.get("reasons", ())]
    notes = [note for note in page.notes if note.kind == "note"]
    parts += [
        element("p", f"{printable(n.body['text'])} ({printable(n.author) or 'no name'}, {n.made[:10]})") for n in notes
    ]
    if page.summary is not None:
        parts += [element("h2", "How often and how strongly"), html_table(("", ""), page_facts(page))]
    if page.histogram is not None and page.histogram.counts.any():
        parts.append(html_bars(page.histogram.edges.tolist(), page.histogram.counts.tolist()))
    if page.promoted:
        sides = (token_table("Promotes", page.promoted), token_table("Demotes", page.demoted))
        parts += [element("div", *sides, class_="side")]
    near = (
        ("Of like direction", page.similar),
        ("On the same tokens", page.cofiring),
        ("In other layers", page.elsewhere),
    )
    parts.append(element("div", *(neighbour_table(name, some) for name, some in near if some), class_="side"))
    for name, some in (("Strongest contexts", page.strongest), ("From weak to strong", page.spread)):
        if some:
            parts += [element("h2", name), *(context_line(context, page.maximum) for context in some)]
    shown = [reason for context in (*page.strongest, *page.spread) for reason in context.left_out]
    if note := marks_note(shown, "A dashed frame"):
        parts.append(element("p", note, class_="place"))
    return parts


def label_text(label: Label | None) -> str:
    """A label with its scores, and who wrote it; of one at chance it says so."""
    if label is None:
        return "No label yet."
    who = f"by {printable(label.source)}" if label.by_model else "by rule, no model wrote this"
    scores = f"detection {label.detection}, fuzzing {label.fuzzing}"
    return f"{printable(label.shown)} ({who}; {scores}: balanced accuracy, judged by {printable(label.scorer)})"


def page_facts(page: FeaturePage) -> list[tuple[str, float | int]]:
    """The figures of a page, named."""
    s = page.summary
    if s is None:
        return []
    facts: list[tuple[str, float | int]] = [
        ("tokens it fires on", s.tokens),
        ("share of tokens", s.frequency),
        ("share of documents", s.document_frequency),
        ("mean where it fires", s.mean_active),
        ("maximum", s.maximum),
    ]
    return facts + [
        (f"{share:.0%} of its activations at most", value) for share, value in (page.quantiles or {}).items()
    ]


def token_table(name: str, effects: tuple[TokenEffect, ...]) -> Markup:
    rows = [(visible(one.text), one.effect) for one in effects]
    return element("div", element("h2", name), html_table(("token", "logit"), rows))


def neighbour_table(name: str, some: tuple[Neighbour, ...]) -> Markup:
    rows = [(f"{one.layer}/{one.feature}", one.cosine, one.jaccard) for one in some]
    return element("div", element("h2", name), html_table(("layer/feature", "cosine", "Jaccard"), rows))


def context_line(context: Context, maximum: float) -> Markup:
    place = f"{context.value:.4g} at {context.place}"
    return join(html_tokens(context.tokens, context.values, maximum, place, context.left_out))

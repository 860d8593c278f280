"""All about one feature, as plain data, and the same as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qwen_scope.errors import printable
from qwen_scope.report import (
    HasFrames,
    Markup,
    Table,
    element,
    html_bars,
    html_page,
    html_table,
    html_tokens,
    join,
    marks_note,
    styled,
    visible,
)
from qwen_scope.store import Context, FeatureSummary, Histogram

from .effects import TokenEffect
from .explanations import Explanation
from .label_entry import Label
from .lens import LensReading
from .neighbours import Neighbour
from .notes import Note


@dataclass(frozen=True, eq=False, repr=False)
class FeaturePage(HasFrames):
    """All about one feature. What could not be known (no store, no model) is None or empty.

    Attributes:
        layer, feature: which.   group: the released set of its SAE.   model: where the language model came from.
        store: the folder of the store, or None.
        summary: how often and how strongly it fires.   quantiles: of its activations, by share.
        histogram: of its activations.
        strongest: the contexts of its largest activations, one per document.
        spread: contexts from every stratum of its activations, strongest first.
        promoted, demoted: tokens it makes more and less likely, by the direct path.
        lens: what a Jacobian lens reads of it, where one was given.
        similar: features of like direction.   cofiring: features on the same tokens.
        elsewhere: the same feature in other layers.
        label: the label to show, with its scores.   notes: labels, notes and verdicts on it, oldest first.
        verdict: the newest causal verdict, as `validate` gave it.
        explanations: what Neuronpedia says of it, where that was imported.
    """

    layer: int
    feature: int
    group: str
    model: str
    store: str | None = None
    summary: FeatureSummary | None = None
    quantiles: dict[float, float] | None = None
    histogram: Histogram | None = None
    strongest: tuple[Context, ...] = ()
    spread: tuple[Context, ...] = ()
    promoted: tuple[TokenEffect, ...] = ()
    demoted: tuple[TokenEffect, ...] = ()
    lens: LensReading | None = None
    similar: tuple[Neighbour, ...] = ()
    cofiring: tuple[Neighbour, ...] = ()
    elsewhere: tuple[Neighbour, ...] = ()
    label: Label | None = None
    notes: tuple[Note, ...] = ()
    verdict: dict[str, Any] | None = None
    explanations: tuple[Explanation, ...] = ()

    @property
    def maximum(self) -> float:
        """The largest activation in the store: the top of every shading; 0 where nothing is known."""
        return self.summary.maximum if self.summary else 0.0

    def __repr__(self) -> str:
        named = f": {self.label.shown}" if self.label is not None else ""
        return f"FeaturePage({self.layer}/{self.feature}{named})"

    def _repr_html_(self) -> str:
        return styled(join(*page_parts(self)))

    def sheet(self) -> Table:
        """A row per context: how strongly, where, and its text."""
        both = (("strongest", self.strongest), ("spread", self.spread))
        rows = [(kind, one.value, one.place, "".join(one.tokens)) for kind, some in both for one in some]
        return Table(repr(self), ("kind", "activation", "place", "text"), rows)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        if self.label is not None:
            data["label"] = {**asdict(self.label), "at_chance": self.label.at_chance}
        data["notes"] = [note.to_json() for note in self.notes]
        if self.histogram is not None:
            data["histogram"] = {k: np.asarray(v).tolist() for k, v in vars(self.histogram).items()}
        return {name: _plain(value) for name, value in data.items()}


def feature_html(page: FeaturePage) -> str:
    """A self-contained document: it opens from a folder, runs no script and asks nothing of the network."""
    return html_page(f"Layer {page.layer}, feature {page.feature}", *page_parts(page))


def page_parts(page: FeaturePage) -> list[Markup]:
    """What the page consists of, its heading first."""
    parts = [
        element("h1", f"Layer {page.layer}, feature {page.feature}"),
        element("p", f"{printable(page.group)}, {printable(page.model)}", class_="place"),
        element("p", label_text(page.label)),
        *(element("p", printable(one.said)) for one in page.explanations),
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
    measures, values = nearness(some)
    rows = [(f"{one.layer}/{one.feature}", *near) for one, near in zip(some, values, strict=True)]
    return element("div", element("h2", name), html_table(("layer/feature", *measures), rows))


def nearness(some: Sequence[Neighbour]) -> tuple[list[str], list[tuple[float | None, ...]]]:
    """What neighbours were measured by, and of each how near it is: no column that is empty throughout."""
    measured = {"cosine": [one.cosine for one in some], "Jaccard": [one.jaccard for one in some]}
    kept = {name: values for name, values in measured.items() if any(value is not None for value in values)}
    return list(kept), list(zip(*kept.values(), strict=True))


def context_line(context: Context, maximum: float) -> Markup:
    place = f"{context.value:.4g} at {context.place}"
    return join(html_tokens(context.tokens, context.values, maximum, place, context.left_out))


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value

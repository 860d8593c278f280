"""A feature card as one HTML file: the word and its rules, the feature's page, and what was measured beside it."""

from __future__ import annotations

from dataclasses import replace

from qwen_scope.errors import printable
from qwen_scope.features import page_parts
from qwen_scope.report import Markup, element, html_page, html_table

from .card import Card

HELD = {True: "yes", False: "no", None: "not measured"}


def card_html(card: Card) -> str:
    """A self-contained document: it opens from a folder, runs no script and asks nothing of the network."""
    page = card.page
    head, *rest = page_parts(replace(page, elsewhere=()))  # its partners in other layers stand beside chance
    rules = html_table(("rule", "held"), [(rule, HELD[held]) for rule, held in card.trust.reasons])
    parts = [
        head,
        element("p", f"Verdict: {card.trust.word}"),
        element("h2", "Why this word"),
        rules,
        *(element("p", f"Known failure: {printable(one)}.") for one in card.failures),
        *_sections(card),
        *rest,
        element("h2", "Not measured"),
        element("ul", *(element("li", printable(one)) for one in card.missing)),
    ]
    return html_page(f"Layer {page.layer}, feature {page.feature}: {card.trust.word}", *parts)


def _sections(card: Card) -> list[Markup]:
    """One section per kind of measurement that there is."""
    out = [element("h2", "Identity"), html_table(("", ""), [(k, _cell(v)) for k, v in card.identity.items()])]
    for title, columns, rows in card_tables(card):
        out += [element("h2", printable(title)), html_table(columns, rows)]
    return out


def _cell(value: object) -> str | int:
    return value if isinstance(value, int) else "not known" if value is None else printable(str(value))


Cell = str | int | float | None


def card_tables(card: Card) -> list[tuple[str, tuple[str, ...], list[tuple[Cell, ...]]]]:
    """Title, columns and rows of every measurement that the page of a feature does not have."""
    out: list[tuple[str, tuple[str, ...], list[tuple[Cell, ...]]]] = []
    label = card.page.label
    if label is not None:
        both = [("this label", label), *([(f"label of {card.control.of}", card.control.label)] if card.control else [])]
        rows: list[tuple[Cell, ...]] = [(name, str(one.detection), str(one.fuzzing), one.text) for name, one in both]
        if label.random is not None:
            rows.append(("labels of other features", str(label.random), None, None))
        out.append(("The label beside another on the same contexts", ("", "detection", "fuzzing", "text"), rows))
    if (told := card.judged) is not None:
        title = (
            f"The label by its judge (FADE): {told.fitting} of {told.rated} contexts fit, {told.written} texts written"
        )
        rows = [(told.label, told.clarity, told.responsiveness, told.purity)]
        out.append((title, ("label", "clarity", "responsiveness", "purity"), rows))
    if (fit := card.concept) is not None:
        rows = [(fit.concept, str(fit.auroc), fit.responsiveness, fit.purity)]
        if fit.other is not None:
            rows.append((f"the best of the other values: {fit.other}", str(fit.auroc_of_other), None, None))
        title = f"The concept: {fit.documents} documents with it, {fit.others} without"
        out.append((title, ("", "AUROC", "responsiveness", "purity"), rows))
    if (found := card.push) is not None:
        rows = [
            ("adding it: documents with the concept less others", str(found.effect)),
            ("the opposite sign", str(found.opposite)),
            (f"the strongest of {len(found.randoms)} random features", max(found.randoms, default=None)),
            ("on documents with the concept", str(found.on_concept)),
            ("on the others", str(found.on_others)),
            *((f"at {dose:g} of the median norm", effect) for dose, effect in found.doses),
        ]
        out.append(("Log-probability per token, in nats", ("", "change"), rows))
    if card.findings:
        rows = [
            (one["name"], one["against"], one["auroc"]["estimate"], one["f1"]["estimate"], one["q"])
            for one in card.findings
        ]
        out.append(("Found by find, on documents that did not choose it", ("by", "against", "AUROC", "F1", "q"), rows))
    if card.faithfulness is not None:
        out.append(("Faithfulness (FADE)", ("", ""), [("by the shares that validate recorded", card.faithfulness)]))
    out += stability_tables(card)
    for title, some in (("Splitting: parts of it", card.parts), ("Absorption: may have cases of it", card.absorbers)):
        if some:
            rows = [(one.feature, one.tokens, one.within, one.cosine) for one in some]
            out.append((title, ("feature", "tokens", "of these with it", "cosine"), rows))
    if card.phases:
        out.append(("Phases it fires in", ("phase", "tokens"), list(card.phases.items())))
    return out


def stability_tables(card: Card) -> list[tuple[str, tuple[str, ...], list[tuple[Cell, ...]]]]:
    """Where the feature is found again, each beside what chance gives."""
    out: list[tuple[str, tuple[str, ...], list[tuple[Cell, ...]]]] = []
    if (both := card.halves) is not None:
        rows: list[tuple[Cell, ...]] = [
            (f"{n} documents", tokens, partner, jaccard)
            for n, tokens, partner, jaccard in zip(
                both.documents, both.tokens, both.partners, both.jaccards, strict=True
            )
        ]
        columns = ("half", "tokens it fires on", "fires most with", "Jaccard")
        title = f"On two halves of the documents: overlap of its tokens {both.overlap:.3f}"
        if both.chance is not None:
            title += f", of {both.controls} other features at most {both.chance:.3f}"
        out.append((title, columns, rows))
    if card.layers:
        columns = ("layer/feature", "cosine", "Jaccard", "chance", "found")
        rows = [
            (f"{one.layer}/{one.feature}", one.cosine, one.jaccard, one.chance, HELD[one.found]) for one in card.layers
        ]
        out.append(("In other layers", columns, rows))
    if card.siblings:
        columns = (
            "dictionary",
            "other",
            "partner",
            "cosine",
            "chance",
            "fires most with",
            "Jaccard",
            "chance",
            "found",
        )
        rows = [
            (
                one.name, ", ".join(one.differs) or "nothing", one.partner, one.cosine, one.chance, one.cofires_with,
                one.jaccard, one.chance_jaccard, HELD[one.found] + (", as chance" if one.at_chance else ""),
            )
            for one in card.siblings
        ]  # fmt: skip
        out.append(("In other dictionaries", columns, rows))
    return out

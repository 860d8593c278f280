"""`qwen-scope card`: everything known of one feature, and how far to trust it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.errors import InputError, printable
from qwen_scope.scope import ScopeOptions
from qwen_scope.trust import CardOptions

from . import names, options, output, show
from .groups import OPTIONS, grouped

if TYPE_CHECKING:
    from qwen_scope.store import FeatureStore
    from qwen_scope.trust import Card, Concept, Other

OPTIONS[CardOptions] = {
    "n": Annotated[int, typer.Option("-n", help="How many tokens, neighbours and contexts of each kind.", min=1)],
    "effect": Annotated[
        bool, typer.Option("--effect", help="Also measure whether adding it makes the concept's documents likelier.")
    ],
    "texts": Annotated[int, typer.Option("--texts", help="Documents of either kind that --effect scores.", min=2)],
    "ask": Annotated[
        bool, typer.Option("--ask", help="Also ask the judge of the environment (OPENAI_BASE_URL) about the label.")
    ],
    "again": Annotated[bool, typer.Option("--again", help="Measure anew what the store's record holds.")],
    "seed": Annotated[int, typer.Option("--seed", help="Of what is drawn.", **options.SEED)],
}
HOW = CardOptions()


@grouped
def card(
    folder: Annotated[Path, typer.Argument(metavar="STORE", help="A store that extract has written.")],
    name: Annotated[str, typer.Argument(metavar="LAYER/FEATURE", help="Which feature.")],
    concept: Annotated[
        str | None, typer.Option("--concept", help="What it is taken to stand for: COLUMN=VALUE of the metadata.")
    ] = None,
    other: Annotated[
        list[str] | None,
        typer.Option("--other", help="Look for it there, too: SAEs or a store; @LAYER for another layer. Repeatable."),
    ] = None,
    how: CardOptions = HOW,
    html: Annotated[Path | None, typer.Option("--html", help="Write one HTML file that opens by itself.")] = None,
    interp: Annotated[
        Path | None,
        typer.Option("--interp", help="Write the card as OpenInterpretability's JSON, which needs a label."),
    ] = None,
    lens: Annotated[Path | None, typer.Option("--lens", help="A Jacobian lens (qwen-scope lens fit).")] = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Only what the store knows.")] = False,
    model: options.StoreModel = None,
    sae: options.Sae = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Show everything known of a feature, what was not measured, and a word on how far to trust it.

    The word is solid, usable, shaky or unknown, by rules that are printed. What is measured is kept in the store, and
    is not measured twice; labels come from label, verdicts from validate.
    """
    from qwen_scope.features import JudgeOptions, judge_of, load_lens
    from qwen_scope.files import check_output, write_text
    from qwen_scope.sae import parse_feature
    from qwen_scope.trust import card as make
    from qwen_scope.trust import card_html, interp_card

    for path in (html, interp):
        if path is not None:
            check_output(path, *options.folders(folder, model, sae))
    layer, feature = parse_feature(name)
    store = names.of_store(folder)
    store.check_feature(layer, feature)
    asked = None if concept is None else concept_of(concept)
    others = [other_of(text, layer) for text in other or ()]
    with output.status("opening the model"):
        scope = None if no_model else show.scope_of(store, model, ScopeOptions(sae=sae, device=device, dtype=dtype))
    judge = judge_of(store, JudgeOptions()) if how.ask else None
    with output.status("measuring what is missing"):
        found = make(
            layer,
            feature,
            store=store,
            scope=scope,
            concept=asked,
            others=others,
            lens=None if lens is None else load_lens(lens),
            judge=judge,
            options=how,
        )
    if interp is not None:
        write_text(interp, json.dumps(interp_card(found), ensure_ascii=False, indent=1) + "\n")
    if html is not None:
        write_text(html, card_html(found))
    if as_json:
        output.print_json(found.to_json())
    else:
        print_card(found)


def concept_of(text: str) -> Concept:
    """`language=de` as a concept."""
    from qwen_scope.trust import Concept

    column, sign, value = text.partition("=")
    if not sign or not column or not value:
        raise InputError(f"--concept is COLUMN=VALUE of the documents' metadata, such as language=de, not {text!r:.80}")
    return Concept(column, value)


def other_of(text: str, layer: int) -> Other:
    """A dictionary to look in: SAEs or a store, at the feature's layer or at the one behind an @."""
    from qwen_scope.trust import Other

    from .match import opened, sae_of

    source, at, number = text.rpartition("@")
    if not at or not number.isdecimal():
        source, number = text, str(layer)
    store: FeatureStore | None = opened(source)
    found, there = sae_of(source, store, int(number), None)
    return Other(f"{found.identity.group} layer {number}", found, store, there)


def print_card(found: Card) -> None:
    """The card in the terminal: the word and its rules first."""
    from rich.text import Text

    from qwen_scope.trust import card_tables

    out = output.console()
    out.print(Text(f"{found.trust.word}: layer {found.page.layer}, feature {found.page.feature}", style="bold"))
    names = {True: "yes", False: "no", None: "not measured"}
    for rule, held in found.trust.reasons:
        out.print(Text(f"  {names[held]}: {rule}"), soft_wrap=True)
    for failure in found.failures:
        out.print(Text(printable(f"  known failure: {failure}")))
    out.print()
    for title, columns, rows in card_tables(found):
        output.show(title, columns, rows, layer=found.page.layer)
    show.print_page(replace(found.page, elsewhere=()))  # partners in other layers stand beside chance, above
    out.print("Not measured", style="bold")
    for one in found.missing:
        out.print(Text(printable(f"  {one}")), soft_wrap=True)

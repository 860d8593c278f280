"""`qwen-scope match`: which features of two SAEs are the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.features import MatchOptions

from . import names, options, output
from .groups import OPTIONS, grouped

if TYPE_CHECKING:
    from qwen_scope.features import Matching, Partners
    from qwen_scope.sae import SAE
    from qwen_scope.store import FeatureStore

OPTIONS[MatchOptions] = {
    "cosine": Annotated[float, typer.Option("--cosine", help="The least cosine of two partners.", max=1)],
    "jaccard": Annotated[float, typer.Option("--jaccard", help="The least Jaccard index of two partners.", max=1)],
    "draws": Annotated[int, typer.Option("--draws", help="Shuffled dictionaries that tell chance.", min=1)],
    "sample": Annotated[int, typer.Option("--sample", help="Features that chance is measured on.", min=1)],
    "tokens": Annotated[int, typer.Option("--tokens", help="Of stores at most so many tokens.", min=1)],
    "seed": Annotated[int, typer.Option("--seed", help="Of chance.", **options.SEED)],
}
HOW = MatchOptions()
SIDE = "SAEs (a group, folder, file or Hub id), or a store."


@grouped
def match(
    a: Annotated[str, typer.Argument(metavar="A", help=SIDE)],
    b: Annotated[str, typer.Argument(metavar="B", help=f"The others: {SIDE}")],
    layer: Annotated[int | None, typer.Option("--layer", help="Of A. Default: the only one.")] = None,
    other_layer: Annotated[int | None, typer.Option("--other-layer", help="Of B. Default: that of A.")] = None,
    how: MatchOptions = HOW,
    k: options.K = None,
    n: Annotated[int, typer.Option("-n", help="How many features without a partner to name.", min=1)] = 10,
    pairs: Annotated[Path | None, typer.Option("--pairs", help="Write a line of JSON for every feature of A.")] = None,
    as_json: options.Json = False,
) -> None:
    """Pair the features of two SAEs by decoder cosine and co-firing, beside what chance gives.

    They may differ in k, width, seed, layer, checkpoint and maker. Co-firing is told where both are stores of the same
    documents (qwen-scope extract), or two layers of one store.
    """
    from qwen_scope.features import common_firings
    from qwen_scope.features import match as run_match
    from qwen_scope.files import check_output, write_text

    if pairs is not None:
        check_output(pairs, *options.folders(a, b))
    stores = opened(a), opened(b)
    first, mine = sae_of(a, stores[0], layer, k)
    second, other = sae_of(b, stores[1], layer if other_layer is None else other_layer, k, mine)
    seen = None
    if stores[0] is not None and stores[1] is not None and mine is not None and other is not None:
        with output.status("reading what fires"):
            seen = common_firings(stores[0], mine, stores[1], other, how.tokens)
    with output.progress() as bar:
        found = run_match(first, second, seen, how, progress=bar)
    called = [
        Called(names.opened(store or source), place)
        for store, source, place in zip(stores, (a, b), (mine, other), strict=True)
    ]
    if pairs is not None:
        write_text(pairs, "".join(json.dumps(named_row(row, *called)) + "\n" for row in found.rows()))
    if as_json:
        output.print_json(found.to_json() | {"names": names_of(found, *called)}, named=False)
    else:
        print_matching(found, n, called[0])


def opened(source: str) -> FeatureStore | None:
    """The store that a side is, or None where it is SAEs."""
    from qwen_scope.store import is_store

    return names.of_store(source) if is_store(source) else None


def sae_of(
    source: str, store: FeatureStore | None, layer: int | None, k: int | None, beside: int | None = None
) -> tuple[SAE, int | None]:
    """The SAE of a side, named or the one that its store was made with, and its layer.

    Args:
        beside: the layer of the other side, taken where none was named and there are several.
    """
    from qwen_scope.sae import layers_of, load_sae

    there = layers_of(source) if store is None else store.layers
    if layer is None and len(there) > 1:
        layer = beside
        if layer is None:
            raise InputError(f"{source} has layers {', '.join(map(str, there))}; name one with --layer")
    elif layer is None and there:
        layer = there[0]
    if layer is not None and there and layer not in there:
        raise NotFoundError(f"{source} has no layer {layer}; it has layers {', '.join(map(str, there))}")
    saes = source if store is None or layer is None else store.source("saes") or store.layer(layer).group
    sae = load_sae(saes, layer, k=k)
    if store is not None and layer is not None:
        store.require(layer, sae)
    return sae, layer


@dataclass(frozen=True)
class Called:
    """What features of a side are called."""

    names: names.Names
    layer: int | None

    def of(self, feature: int | None) -> str:
        """ "" where it has no name, or there is none."""
        return "" if feature is None or self.layer is None else self.names(self.layer, feature)


def named_row(row: dict[str, Any], a: Called, b: Called) -> dict[str, Any]:
    """A row of pairs with the names of both where they have some."""
    more = {"name": a.of(row["feature"]), "partner_name": b.of(row["partner"])}
    return row | {key: said for key, said in more.items() if said}


def names_of(found: Matching, a: Called, b: Called) -> dict[str, dict[int, str]]:
    """What the features without a partner are called on each side, those that have a name."""
    some = [one for one in (found.cosine, found.jaccard) if one is not None]
    left = [f for one in some for f in one.unmatched], [f for one in some for f in one.unmatched_back or ()]
    return {
        side: {f: said for f in dict.fromkeys(every) if (said := one.of(f))}
        for side, one, every in zip("ab", (a, b), left, strict=True)
    }


def print_matching(found: Matching, n: int, called: Called) -> None:
    """Both measures beside chance, and features without a partner."""
    out = output.console()
    out.print(f"{found.a} beside {found.b}", soft_wrap=True)
    rows = [row_of(one) for one in (found.cosine, found.jaccard) if one is not None]
    columns = ("by", "features", "partner from", "share", "mutual", "mean best", "corrected", "chance: mean", "share")
    output.show("The best partner of each feature", columns, rows)
    for one in (found.cosine, found.jaccard):
        if one is None:
            out.print("Co-firing was not measured: name two stores of the same documents (qwen-scope extract).")
            continue
        if one.at_chance:
            out.print(f"By {one.measure} this is chance: a shuffled dictionary does as well.", style="bold")
        if left := one.unmatched:
            more = f", and {len(left) - n} more" if len(left) > n else ""
            shown = ", ".join(f"{f} ({said})" if (said := called.of(f)) else str(f) for f in left[:n])
            out.print(f"Without a partner by {one.measure}: {shown}{more}", soft_wrap=True)
    if found.agree is not None:
        out.print(f"Of those with a partner by cosine, {found.agree:.1%} fire most with that same one.")


def row_of(one: Partners) -> tuple[str | float | int, ...]:
    """One measure as a row."""
    corrected = "" if one.corrected is None else str(one.corrected)
    chance = one.chance
    return (
        one.measure, len(one.features), one.least, one.share, one.mutual_share, one.mean, corrected, chance.mean,
        chance.share,
    )  # fmt: skip

"""`qwen-scope store`: what a store holds, one feature of it, or the answer to a query."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_scope.errors import InputError, foreign

from . import names, options, output
from .commands import App, Shown
from .extract import show_store

if TYPE_CHECKING:
    from qwen_scope.store import FeatureStore

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
WAYS = ("top", "random", "quantiles")


app = App(
    cls=Shown,
    help="What a store holds: qwen-scope store STORE, which is short for store show STORE; or merge stores.",
    no_args_is_help=True,
)


@app.command("show")
def store(
    folder: Annotated[Path, typer.Argument(metavar="STORE", help="A folder that extract has written.")],
    layer: Annotated[int | None, typer.Option("--layer", help="Which layer. Default: the only one.")] = None,
    name: Annotated[str | None, typer.Option("--feature", "-f", help="All about one: LAYER/FEATURE.")] = None,
    n: Annotated[int, typer.Option("-n", help="How many contexts, or features.", min=1)] = 10,
    how: Annotated[str, typer.Option("--how", help="Contexts: top, random or quantiles.")] = "top",
    seed: Annotated[int, typer.Option("--seed", help="Of random and quantiles.", **options.SEED)] = 0,
    phase: options.Phase = None,
    query: Annotated[
        str | None, typer.Option("--sql", help="One SELECT for DuckDB; tables in docs/store-format.md.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every part with its checksum.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show what a store holds; with --feature its statistics and contexts, with --layer the most frequent features."""
    layer, feature = options.place_of(layer, name)
    with names.of_store(folder) as opened:
        if verify:
            opened.verify()
        if query is not None:
            show_rows("", opened.answer(query), as_json, named=False)
        elif feature is not None:
            show_feature(opened, the_layer(opened, layer), feature, n, how, seed, options.check_phases(phase), as_json)
        elif layer is not None:
            rows = opened.stats(layer).sort_by([("tokens", "descending"), ("feature", "ascending")]).slice(0, n)
            columns = ["feature", "frequency", "documents", "mean", "maximum"]
            show_rows(f"Layer {layer}: the most frequent features", rows.select(columns), as_json, layer)
        else:
            show_store(opened, as_json)


@app.command("merge")
def merge(
    shares: Annotated[list[Path], typer.Argument(metavar="STORE...", help="The stores of all shares, in any order.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The store to write; an unfinished one goes on.")],
    as_json: options.Json = False,
) -> None:
    """Join the stores of extract --share into the one store that a single run would have written.

    Stopped in whatever way, the same command goes on where it was. The shares stay as they are.
    """
    from qwen_scope.files import not_onto_itself
    from qwen_scope.store import merge as run

    not_onto_itself(out, *shares)
    with output.progress() as bar:
        opened = run(out, shares, bar)
    with opened:
        show_store(opened, as_json)


def the_layer(opened: FeatureStore, layer: int | None) -> int:
    """The layer that was asked for, or the only one there is."""
    if layer is None:
        if len(opened.layers) > 1:
            raise InputError(f"the store has layers {', '.join(map(str, opened.layers))}; name one with --layer")
        layer = opened.layers[0]
    return layer


def show_rows(title: str, table: Any, as_json: bool, layer: int | None = None, *, named: bool = True) -> None:
    """An arrow table as JSON or as a table; `layer` and `named` as for `output.show`."""
    with foreign("the answer can't be shown", InputError, "cast the column to a text"):
        columns = [column.to_pylist() for column in table.columns]
    if as_json:
        rows = [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]
        output.print_json(rows, layer=layer, named=named)
        return
    rows = [
        [v if isinstance(v, str | int | float | None) else str(v) for v in row] for row in zip(*columns, strict=True)
    ]
    output.show(title, table.column_names, rows, layer=layer, named=named)


def show_feature(
    opened: FeatureStore,
    layer: int,
    feature: int,
    n: int,
    how: str,
    seed: int,
    phases: list[str] | None,
    as_json: bool,
) -> None:
    """Statistics and contexts of one feature."""
    for way in WAYS:
        if how == way:
            found = opened.contexts(layer, feature, n, how=way, seed=seed, phases=phases)
            break
    else:
        raise InputError(f"--how is one of {', '.join(WAYS)}, not {how!r}")
    stats = opened.feature(layer, feature)
    quantiles = opened.quantiles(layer, feature, SHARES).tolist() if stats.tokens else []
    histogram = opened.histogram(layer, feature)
    if as_json:
        drawn = {"edges": histogram.edges.tolist(), "counts": histogram.counts.tolist()}
        contexts = [asdict(context) for context in found]
        shares = dict(zip(map(str, SHARES), quantiles, strict=False))
        output.print_json({**asdict(stats), "quantiles": shares, "histogram": drawn, "contexts": contexts})
        return
    shown = [(name, value) for name, value in asdict(stats).items() if name not in ("layer", "feature")]
    shown += [(f"{share:.0%} of its tokens at most", value) for share, value in zip(SHARES, quantiles, strict=False)]
    output.show(names.called(layer, feature), ("statistic", "value"), shown)
    output.print_contexts(found, stats.maximum)

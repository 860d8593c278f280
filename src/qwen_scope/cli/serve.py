"""`qwen-scope serve`: vLLM's server with the plugin."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.serve import ServeSettings

from . import options, output

if TYPE_CHECKING:
    from qwen_scope.serve import Launch


def serve(
    model: Annotated[str, typer.Argument(help="Language model: 'lab' (bundled), a Hub id or a folder.")],
    flags: Annotated[
        list[str] | None, typer.Argument(metavar="[-- FLAGS OF VLLM]", help="Passed on to vllm serve as they are.")
    ] = None,
    sae: options.Sae = None,
    layers: Annotated[
        str | None, typer.Option("--layers", "--layer", help="Where vectors can be added. Default: --feature-layers.")
    ] = None,
    feature_layers: Annotated[
        str | None, typer.Option("--feature-layers", help="Where features can be scaled, clamped, bounded or ablated.")
    ] = None,
    read_layers: Annotated[str | None, typer.Option("--read-layers", help="Where activations can be read.")] = None,
    recipes: Annotated[
        Path | None, typer.Option("--recipes", help="A folder of recipes (NAME.json) that requests can name.")
    ] = None,
    watch: Annotated[
        Path | None,
        typer.Option("--watch", help="Rules asked of every request: a file of watches, or a rule of classify fit."),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option("--stats", help="Statistics that relative amounts need; measured and written if not there."),
    ] = None,
    rows: Annotated[
        int, typer.Option("--rows", help="Rows of the tables for each running request.", min=1)
    ] = ServeSettings.rows,
    k: options.K = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be executed, and end.")] = False,
) -> None:
    """Serve a model with vLLM, where every request may steer it and read its features.

    What follows -- goes to vLLM: qwen-scope serve MODEL --layers 4 -- --port 8001 --tensor-parallel-size 2
    """
    from qwen_scope.scope import resolve
    from qwen_scope.serve import launch, run, with_stats

    options.quiet()
    place, group = resolve(model, sae) if sae is not None or model == "lab" else (model, None)
    settings = ServeSettings(
        sae=group,
        k=k,
        layers=options.layers_tuple(layers) or (),
        feature_layers=options.layers_tuple(feature_layers) or (),
        read_layers=options.layers_tuple(read_layers) or (),
        recipes=None if recipes is None else str(recipes.resolve()),
        watch=None if watch is None else str(watch.resolve()),
        rows=rows,
    )
    if stats is not None:
        with output.status("measuring the layers"):
            settings = with_stats(settings, model, stats)
    made = launch(place, settings, flags or [])
    say(made)
    if dry_run:
        set_first = " ".join(f"{name}={value}" for name, value in made.env.items())
        output.write(f"{set_first} {shlex.join(made.argv)}\n")
        return
    run(made)


def say(made: Launch) -> None:
    """What the plugin takes on every worker."""
    parts = [f"tables {made.table_bytes / 1e6:,.1f} MB", f"SAEs {made.sae_bytes / 1e6:,.1f} MB"]
    if made.tap_bytes:
        parts.append(f"{made.tap_bytes / 1e6:,.1f} MB to read from for each 1,000 tokens of a step")
    output.console().print(f"On every worker: {', '.join(parts)}.", soft_wrap=True)

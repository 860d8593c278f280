"""`qwen-scope export`: a store for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen_scope.errors import InputError

from . import options, output, show
from .store import the_layer

KINDS = ("statistics", "neuronpedia", "delphi")


def export(
    folder: Annotated[Path, typer.Argument(metavar="STORE", help="A store that extract has written.")],
    to: Annotated[str, typer.Option("--to", help=f"One of {', '.join(KINDS)}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .csv or .parquet file for statistics, else a folder.")],
    layers: options.Layers = None,
    features: Annotated[
        str | None, typer.Option("--features", "-f", help="Neuronpedia: which, such as 3,17,40-50. Default: all.")
    ] = None,
    model_id: Annotated[str | None, typer.Option("--model-id", help="Neuronpedia: its name of the model.")] = None,
    set_name: Annotated[str, typer.Option("--set", help="Neuronpedia: the source set.")] = "qwen-scope",
    no_model: Annotated[bool, typer.Option("--no-model", help="Neuronpedia: without the tokens it promotes.")] = False,
    context: Annotated[int, typer.Option("--context", help="delphi: tokens of a row.", min=1)] = 256,
    splits: Annotated[int, typer.Option("--splits", help="delphi: files per layer.", min=1)] = 5,
    module: Annotated[str, typer.Option("--module", help="delphi: a layer's module, {} for its number.")] = "layers.{}",
    as_json: options.Json = False,
) -> None:
    """Write Neuronpedia's upload and bulk files, a latents folder for delphi, or a table of statistics with labels."""
    from qwen_scope.corpus import FeatureStore
    from qwen_scope.features import export_delphi, export_neuronpedia, export_statistics
    from qwen_scope.files import not_onto_itself

    options.one_of("--to", to, KINDS)
    not_onto_itself(out, folder)
    wanted = options.parse_layers(layers)
    store = FeatureStore(folder)
    with output.progress() as bar:
        report = lambda done, of: bar(to, done / max(1, of), f"{done} of {of}")  # noqa: E731
        if to == "statistics":
            n = export_statistics(store, out, wanted)
        elif to == "delphi":
            n = export_delphi(store, out, layers=wanted, module=module, context=context, splits=splits, report=report)
        else:
            if model_id is None:
                raise InputError("name the model as Neuronpedia knows it with --model-id, such as qwen3-1.7b")
            if wanted is not None and len(wanted) > 1:
                raise InputError("Neuronpedia's files are made layer by layer; name one with --layers")
            layer = the_layer(store, wanted[0] if wanted else None)
            scope = None if no_model else show.scope_of(store, None, None, None, "auto", None)
            chosen = options.parse_layers(features)
            n = export_neuronpedia(
                store, layer, out, model_id=model_id, set_name=set_name, scope=scope, features=chosen, report=report
            )
    what = {"statistics": "rows", "neuronpedia": "features", "delphi": "activations"}[to]
    if as_json:
        output.print_json({"written": str(out), what: n})
    else:
        output.console().print(f"{out}: {n:,} {what}", soft_wrap=True)

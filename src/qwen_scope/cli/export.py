"""`qwen-scope export`: a store for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_scope.errors import InputError

from . import options, output, show
from .store import the_layer

if TYPE_CHECKING:
    from qwen_scope.features import Creator
    from qwen_scope.store import FeatureStore

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
    method: Annotated[
        str | None, typer.Option("--method", help="Neuronpedia: a registered way. Default: oai_token-act-pair.")
    ] = None,
    explainer: Annotated[
        str | None, typer.Option("--explainer", help="Neuronpedia: a registered model. Default: gpt-4o-mini.")
    ] = None,
    creator_id: Annotated[
        str | None, typer.Option("--creator-id", help="Neuronpedia's bulk files: key of a user there.")
    ] = None,
    creator_name: Annotated[str | None, typer.Option("--creator-name", help="The user's name.")] = None,
    owner: Annotated[str | None, typer.Option("--owner", help="The model's owner, such as Qwen.")] = None,
    model_layers: Annotated[int | None, typer.Option("--model-layers", help="Default: as the model says.")] = None,
    model_neurons: Annotated[int | None, typer.Option("--model-neurons", help="Of a layer's MLP.")] = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Neuronpedia: without the tokens it promotes.")] = False,
    context: Annotated[int, typer.Option("--context", help="delphi: tokens of a row.", min=1)] = 256,
    splits: Annotated[int, typer.Option("--splits", help="delphi: files per layer.", min=1)] = 5,
    module: Annotated[str, typer.Option("--module", help="delphi: a layer's module, {} for its number.")] = "layers.{}",
    model_name: Annotated[
        str | None, typer.Option("--model-name", help="delphi: the model it is to load. Default: the store's.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write Neuronpedia's upload and bulk files, a latents folder for delphi, or a table of statistics with labels."""
    from qwen_scope.features import export_delphi, export_statistics
    from qwen_scope.files import not_onto_itself
    from qwen_scope.store import FeatureStore

    options.one_of("--to", to, KINDS)
    not_onto_itself(out, folder)
    wanted = options.parse_layers(layers)
    store = FeatureStore(folder)
    with output.progress() as bar:
        report = lambda done, of: bar(to, done / max(1, of), f"{done} of {of}")  # noqa: E731
        if to == "statistics":
            n = export_statistics(store, out, wanted)
        elif to == "delphi":
            how: dict[str, Any] = {"module": module, "context": context, "splits": splits, "model_name": model_name}
            n = export_delphi(store, out, layers=wanted, report=report, **how)
        else:
            by = creator(creator_id, creator_name, owner, model_layers, model_neurons)
            n = neuronpedia(
                store,
                out,
                wanted,
                model_id,
                options.parse_features(features) if features else None,
                no_model,
                report,
                {"set_name": set_name, "creator": by, "method": method, "explainer": explainer},
            )
    what = {"statistics": "rows", "neuronpedia": "features", "delphi": "activations"}[to]
    if as_json:
        output.print_json({"written": str(out), what: n})
    else:
        output.console().print(f"{out}: {n:,} {what}", soft_wrap=True)
    if to == "neuronpedia" and creator_id is None and not as_json:
        output.console().print(
            "Only the upload; the bulk files need --creator-id, --creator-name and --owner", soft_wrap=True
        )


def neuronpedia(
    store: FeatureStore,
    out: Path,
    layers: list[int] | None,
    model_id: str | None,
    features: list[int] | None,
    no_model: bool,
    report: Any,
    how: dict[str, Any],
) -> int:
    """Write one layer for Neuronpedia; how many features."""
    from qwen_scope.features import export_neuronpedia

    if model_id is None:
        raise InputError("name the model as Neuronpedia knows it with --model-id, such as qwen3-1.7b")
    if layers is not None and len(layers) > 1:
        raise InputError("Neuronpedia's files are made layer by layer; name one with --layers")
    layer = the_layer(store, layers[0] if layers else None)
    scope = None if no_model else show.scope_of(store, None, None, None, "auto", None)
    given = {name: value for name, value in how.items() if value is not None}
    return export_neuronpedia(
        store, layer, out, model_id=model_id, features=features, scope=scope, report=report, **given
    )


def creator(
    id: str | None, name: str | None, owner: str | None, layers: int | None, neurons: int | None
) -> Creator | None:
    """Who a bulk import belongs to; None where nothing was said.

    Raises:
        InputError: some of it was said, but not all that the files need.
    """
    from qwen_scope.features import Creator

    if id is None and name is None and owner is None and layers is None and neurons is None:
        return None
    if id is None or name is None or owner is None:
        raise InputError("Neuronpedia's bulk files need all of --creator-id, --creator-name and --owner")
    return Creator(id, name, owner, layers, neurons)

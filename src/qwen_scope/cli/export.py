"""`qwen-scope export`: a store for other tools."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.errors import InputError
from qwen_scope.features import DelphiOptions, NeuronpediaOptions

from . import options, output, show
from .groups import OPTIONS, Read, grouped
from .store import the_layer

if TYPE_CHECKING:
    from qwen_scope.report import Progress
    from qwen_scope.store import FeatureStore

KINDS = ("statistics", "neuronpedia", "delphi")


OPTIONS[NeuronpediaOptions] = {
    "features": Annotated[
        str | None,
        typer.Option("--features", "-f", help="Neuronpedia: which, such as 3,17,40-50. Default: all."),
        Read(lambda text: tuple(options.parse_features(text))),
    ],
    "model_id": Annotated[str | None, typer.Option("--model-id", help="Neuronpedia: its name of the model.")],
    "set_name": Annotated[str, typer.Option("--set", help="Neuronpedia: the source set.")],
    "method": Annotated[
        str | None, typer.Option("--method", help="Neuronpedia: a registered way. Default: oai_token-act-pair.")
    ],
    "explainer": Annotated[
        str | None, typer.Option("--explainer", help="Neuronpedia: a registered model. Default: gpt-4o-mini.")
    ],
    "creator_id": Annotated[
        str | None, typer.Option("--creator-id", help="Neuronpedia's bulk files: key of a user there.")
    ],
    "creator_name": Annotated[str | None, typer.Option("--creator-name", help="The user's name.")],
    "owner": Annotated[str | None, typer.Option("--owner", help="The model's owner, such as Qwen.")],
    "model_layers": Annotated[int | None, typer.Option("--model-layers", help="Default: as the model says.")],
    "model_neurons": Annotated[int | None, typer.Option("--model-neurons", help="Of a layer's MLP.")],
    "no_model": Annotated[bool, typer.Option("--no-model", help="Neuronpedia: without the tokens it promotes.")],
}
OPTIONS[DelphiOptions] = {
    "context": Annotated[int, typer.Option("--context", help="delphi: tokens of a row.", min=1)],
    "splits": Annotated[int, typer.Option("--splits", help="delphi: files per layer.", min=1)],
    "module": Annotated[str, typer.Option("--module", help="delphi: a layer's module, {} for its number.")],
    "model_name": Annotated[
        str | None, typer.Option("--model-name", help="delphi: the model it is to load. Default: the store's.")
    ],
}


@grouped
def export(
    folder: Annotated[Path, typer.Argument(metavar="STORE", help="A store that extract has written.")],
    to: Annotated[str, typer.Option("--to", help=f"One of {', '.join(KINDS)}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .csv or .parquet file for statistics, else a folder.")],
    neuronpedia: NeuronpediaOptions,
    delphi: DelphiOptions,
    layers: options.Layers = None,
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
        if to == "statistics":
            n = export_statistics(store, out, wanted)
        elif to == "delphi":
            n = export_delphi(store, out, layers=wanted, progress=bar, **asdict(delphi))
        else:
            n = for_neuronpedia(store, out, wanted, neuronpedia, bar)
    what = {"statistics": "rows", "neuronpedia": "features", "delphi": "activations"}[to]
    if as_json:
        output.print_json({"written": str(out), what: n})
    else:
        output.console().print(f"{out}: {n:,} {what}", soft_wrap=True)
    if to == "neuronpedia" and neuronpedia.creator_id is None and not as_json:
        output.console().print(
            "Only the upload; the bulk files need --creator-id, --creator-name and --owner", soft_wrap=True
        )


def for_neuronpedia(
    store: FeatureStore, out: Path, layers: list[int] | None, how: NeuronpediaOptions, progress: Progress
) -> int:
    """Write one layer for Neuronpedia; how many features."""
    from qwen_scope.features import export_neuronpedia
    from qwen_scope.scope import ScopeOptions

    creator = how.creator
    if how.model_id is None:
        raise InputError("name the model as Neuronpedia knows it with --model-id, such as qwen3-1.7b")
    if layers is not None and len(layers) > 1:
        raise InputError("Neuronpedia's files are made layer by layer; name one with --layers")
    layer = the_layer(store, layers[0] if layers else None)
    scope = None if how.no_model else show.scope_of(store, None, ScopeOptions())
    registered = {
        name: value for name, value in vars(how).items() if name in ("method", "explainer") and value is not None
    }
    return export_neuronpedia(
        store, layer, out, model_id=how.model_id, set_name=how.set_name, creator=creator, features=how.features,
        scope=scope, progress=progress, **registered,
    )  # fmt: skip

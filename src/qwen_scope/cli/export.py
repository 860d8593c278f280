"""`qwen-scope export`: a store for other tools, and a recipe for other runtimes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.errors import InputError
from qwen_scope.features import DelphiOptions, NeuronpediaOptions
from qwen_scope.scope import ScopeOptions

from . import changes, options, output, show
from .groups import OPTIONS, grouped
from .store import the_layer

if TYPE_CHECKING:
    from qwen_scope.report import Progress
    from qwen_scope.store import FeatureStore

OF_STORES = ("statistics", "neuronpedia", "neuronpedia-labels", "delphi")
OF_RECIPES = ("control-vector", "ablated-checkpoint")
KINDS = (*OF_STORES, *OF_RECIPES)


OPTIONS[NeuronpediaOptions] = {
    "features": Annotated[
        str | None,
        typer.Option("--features", "-f", help="Neuronpedia: LAYER/FEATURE, as in 2/3,2/40-50. Default: all."),
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
    source: Annotated[
        Path, typer.Argument(metavar="STORE|RECIPE", help="A store that extract has written, or a recipe of steer.")
    ],
    to: Annotated[str, typer.Option("--to", help=f"One of {', '.join(KINDS)}.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="A .csv or .parquet file for statistics, a .gguf for control-vector, else a folder."
        ),
    ],
    neuronpedia: NeuronpediaOptions,
    delphi: DelphiOptions,
    asked: ScopeOptions = changes.SCOPE,
    layers: options.Layers = None,
    as_json: options.Json = False,
) -> None:
    """Write a store for other tools, or a recipe for other runtimes.

    A store: Neuronpedia's upload and bulk files, its label batches as they were imported, a latents folder for delphi,
    or a table of statistics with labels.
    A recipe: a control vector for llama.cpp, or a checkpoint without the directions that the recipe ablates.
    """
    from qwen_scope.features import export_delphi, export_explanations, export_statistics
    from qwen_scope.files import not_onto_itself
    from qwen_scope.store import FeatureStore

    options.one_of("--to", to, KINDS)
    not_onto_itself(out, source)
    wanted = options.parse_layers(layers)
    if to in OF_RECIPES:
        if wanted is not None:
            raise InputError("a recipe names its own layers; leave --layers away")
        for_runtime(source, to, out, asked, as_json)
        return
    store = FeatureStore(source)
    with output.progress() as bar:
        if to == "statistics":
            n = export_statistics(store, out, wanted)
        elif to == "neuronpedia-labels":
            n = export_explanations(store, out)
        elif to == "delphi":
            n = export_delphi(store, out, layers=wanted, progress=bar, **asdict(delphi))
        else:
            n = for_neuronpedia(store, out, wanted, neuronpedia, bar)
    what = {"statistics": "rows", "neuronpedia": "features", "delphi": "activations"}.get(to, "batches")
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
    from qwen_scope.sae import features_at
    from qwen_scope.scope import ScopeOptions

    creator = how.creator
    if how.model_id is None:
        raise InputError("name the model as Neuronpedia knows it with --model-id, such as qwen3-1.7b")
    if layers is not None and len(layers) > 1:
        raise InputError("Neuronpedia's files are made layer by layer; name one with --layers")
    asked = layers[0] if layers else None
    places = None if how.features is None else features_at(how.features, store.layers, asked)
    if places and len({layer for layer, _ in places}) > 1:
        raise InputError("Neuronpedia's files are made layer by layer; name features of one layer with --features")
    layer = places[0][0] if places else the_layer(store, asked)
    features = None if places is None else [feature for _, feature in places]
    scope = None if how.no_model else show.scope_of(store, None, ScopeOptions())
    registered = {
        name: value for name, value in vars(how).items() if name in ("method", "explainer") and value is not None
    }
    return export_neuronpedia(
        store, layer, out, model_id=how.model_id, set_name=how.set_name, creator=creator, features=features,
        scope=scope, progress=progress, **registered,
    )  # fmt: skip


def for_runtime(recipe: Path, to: str, out: Path, asked: ScopeOptions, as_json: bool) -> None:
    """Write a recipe for another runtime, and say what was written."""
    from qwen_scope.features import export_ablated, export_control_vector, recipe_interventions
    from qwen_scope.files import check_folder, check_output
    from qwen_scope.steer import check_ablated, check_control_vector, load_recipe

    inputs = [recipe, *options.folders_of(asked)]
    given = load_recipe(recipe).interventions  # refused before the model is opened
    if to == "control-vector":
        check_control_vector(given)
        check_output(out, *inputs, endings=(".gguf",))
    else:
        check_ablated(given)
        check_folder(out, (), *inputs)
    scope = options.open_asked(asked)
    interventions = recipe_interventions(scope, recipe)
    if to == "control-vector":
        layers = export_control_vector(scope, interventions, out)
        written, said = {"layers": layers}, f"{out}: vectors of layers {', '.join(map(str, layers))}"
    else:
        with output.status("changing the weights"):
            off = export_ablated(scope, interventions, out)
        written = {"difference": off}
        said = (
            f"{out}: a model whose log-probabilities differ from the recipe's by {off.mean:.2g} nats on average and"
            f" {off.largest:.2g} at most, over {off.tokens} tokens"
        )
    if as_json:
        output.print_json({"written": str(out), **written})
    else:
        output.console().print(said, soft_wrap=True)

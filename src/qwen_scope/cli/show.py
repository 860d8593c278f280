"""`qwen-scope show`: all about one feature, in the terminal, as JSON, or as one HTML file."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.errors import InputError, NotFoundError, QwenScopeWarning, printable
from qwen_scope.scope import ScopeOptions

from . import names, options, output
from .store import the_layer

if TYPE_CHECKING:
    from qwen_scope.features import FeaturePage
    from qwen_scope.scope import Scope
    from qwen_scope.store import FeatureStore


def show(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[STORE]", help="A store that extract has written: where it fires.")
    ] = None,
    layer: Annotated[int | None, typer.Option("--layer", help="Which layer. Default: the only one.")] = None,
    name: Annotated[str | None, typer.Option("--feature", "-f", help="Which: LAYER/FEATURE.")] = None,
    n: Annotated[int, typer.Option("-n", help="How many tokens, neighbours and contexts of each kind.", min=1)] = 10,
    html: Annotated[Path | None, typer.Option("--html", help="Write one HTML file that opens by itself.")] = None,
    lens: Annotated[
        Path | None,
        typer.Option("--lens", help="A Jacobian lens (qwen-scope lens fit), read beside the direct logits."),
    ] = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Only what the store knows.")] = False,
    model: options.StoreModel = None,
    sae: options.Sae = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    k: options.K = None,
    as_json: options.Json = False,
) -> None:
    """Show one feature: contexts, how often and how strongly it fires, tokens it promotes, neighbours, label, verdict.

    Without a STORE only what follows from the weights is known. Labels come from: qwen-scope label STORE
    """
    from qwen_scope.features import feature_html, feature_page, load_lens, with_neighbours
    from qwen_scope.files import check_output, write_text

    if html is not None:
        check_output(html, *options.folders(folder, model, sae))
    layer, feature = options.place_of(layer, name)
    if feature is None:
        raise InputError("name a feature with --feature; qwen-scope find tells which tell two sets of texts apart")
    if folder is None and no_model:
        raise InputError("without a model a feature is shown from a store; name its folder")
    if no_model and (
        given := [name for name, value in (("--model", model), ("--sae", sae), ("--k", k), ("--lens", lens)) if value]
    ):
        raise InputError(
            f"--no-model opens no model and no SAE, so {given[0]} would change nothing; leave one of them out"
        )
    store = names.of_store(folder) if folder is not None else None
    with output.status("opening the model"):
        scope = None if no_model else scope_of(store, model, ScopeOptions(sae=sae, device=device, dtype=dtype, k=k))
    if store is not None:
        layer = the_layer(store, layer)
    elif layer is None:
        raise InputError("name a layer with --layer")
    with output.status("reading"):
        found = None if lens is None else load_lens(lens)
        page = feature_page(
            layer, feature, store=store, scope=scope, n=n, contexts=n, lens=found, with_cofiring=store is None
        )
        if store is not None:
            page = with_neighbours(page, store, scope, n)
    if html is not None:
        write_text(html, feature_html(page))
    if as_json:
        output.print_json(page.to_json())
    elif html is None:
        print_page(page)
    else:
        output.say(f"{html} written")


def scope_of(
    store: FeatureStore | None,
    model: str | None,
    asked: ScopeOptions,
) -> Scope:
    """The scope that was asked for, with `model` in the place of its model; what is left out is taken from the store.

    Each SAE that is opened must be the store's where the store has its layer; another model than the store's is said.
    """
    if store is None:
        return options.open_scope(replace(asked, model=model or "lab"))
    sae = asked.sae
    if model is None:
        sae = sae or store.source("saes") or listed_group(store)
    else:
        tell_of_another_model(store, model)
    model = model or store.source("model") or store.manifest.model
    scope = options.open_scope(replace(asked, model=model, sae=sae))
    scope.saes.tell(lambda layer, opened: store.require(layer, opened) if layer in store.layers else None)
    return scope


def tell_of_another_model(store: FeatureStore, model: str) -> None:
    """Say in a warning that a store was made with another model than the one that was named beside it."""
    from qwen_scope.scope import store_of_another

    if said := store_of_another(store.manifest.model, model):
        warnings.warn(said, QwenScopeWarning, stacklevel=2)


def check_saes(
    store: FeatureStore, model: str | None, sae: str | None, layers: list[int] | None, k: int | None
) -> None:
    """Refuse SAEs that are named beside a store that was made with others, where the store alone is read.

    Raises:
        MismatchError: a layer that both have has another SAE.   NotFoundError, FormatError: there are no such SAEs.
    """
    from qwen_scope.sae import layers_of, load_sae

    if model is not None:
        tell_of_another_model(store, model)
    if sae is not None:
        for layer in sorted(set(layers or store.layers) & set(store.layers) & set(layers_of(sae))):
            store.require(layer, load_sae(sae, layer, k=k))


def listed_group(store: FeatureStore) -> str | None:
    """The group of a store that does not say where its SAEs are; None where the model's default will do.

    Raises:
        NotFoundError: no catalog lists it: it was a folder.
    """
    from qwen_scope.sae import catalog

    groups = sorted({info.group for info in store.manifest.layers.values()})
    if len(groups) == 1 and catalog.lookup(groups[0]) is None:
        raise NotFoundError(
            f"{store.folder} does not say where its SAEs {groups[0]!r} are; name them with --sae FOLDER"
        )
    return groups[0] if len(groups) == 1 else None


def print_page(page: FeaturePage) -> None:
    """The page in the terminal."""
    from qwen_scope.features import label_text, nearness, page_facts
    from qwen_scope.report import visible
    from qwen_scope.scope import model_source

    out = output.console()
    out.print(printable(names.called(page.layer, page.feature)), style="bold")
    model = "lab" if page.model == model_source("lab") else page.model
    out.print(printable(f"{page.group}, {model}"), style="dim")
    out.print(label_text(page.label))
    for one in page.explanations:
        out.print(printable(one.said))
    if page.verdict is not None:
        out.print(printable(f"Verdict: {page.verdict.get('outcome')}"))
    for note in page.notes:
        if note.kind == "note":
            out.print(printable(f"Note: {note.body['text']} ({note.author or 'no name'}, {note.made[:10]})"))
    out.print()
    if page.summary is not None:
        output.show("How often and how strongly", ("", ""), page_facts(page))
    if page.histogram is not None and page.histogram.counts.any():
        output.show("Activations (bars: square roots of counts)", ("from", "tokens", ""), bars(page))
    for name, effects in (("Promotes", page.promoted), ("Demotes", page.demoted)):
        if effects:
            output.show(name, ("token", "logit"), [(visible(one.text), one.effect) for one in effects])
    if page.lens is not None:
        title = f"Disposes to say (Jacobian lens; peak {page.lens.peak:.1f} sd, above {page.lens.beaten:.0%} of random)"
        output.show(title, ("token", "logit"), [(visible(one.text), one.effect) for one in page.lens.promoted])
    near = (("Of like direction", page.similar), ("On the same tokens", page.cofiring))
    for name, some in (*near, ("In other layers", page.elsewhere)):
        if some:
            measures, values = nearness(some)
            rows = [(one.layer, one.feature, *near) for one, near in zip(some, values, strict=True)]
            output.show(name, ("layer", "feature", *measures), rows)
    for name, some in (("Strongest contexts", page.strongest), ("From weak to strong", page.spread)):
        if some:
            out.print(name, style="bold")
            output.print_contexts(some, page.maximum)
            out.print()


def bars(page: FeaturePage, width: int = 40) -> list[tuple[float, int, str]]:
    """The histogram as rows of a table."""
    assert page.histogram is not None
    edges, counts = page.histogram.edges.tolist(), page.histogram.counts.tolist()
    top = max(counts) ** 0.5 or 1.0
    return [(edge, n, "█" * round(width * n**0.5 / top)) for edge, n in zip(edges, counts, strict=False)]

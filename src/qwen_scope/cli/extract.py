"""`qwen-scope extract`: the features of a corpus into a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_scope.text import CorpusOptions

from . import options, output
from .groups import PARAGRAPHS, grouped

if TYPE_CHECKING:
    from qwen_scope.scope import Progress
    from qwen_scope.store import FeatureStore

LAB_DOCUMENTS = 1000


@grouped
def extract(
    source: options.Documents,
    out: Annotated[Path, typer.Option("--out", "-o", help="The store to write; an unfinished one goes on.")],
    model: options.Model = "lab",
    sae: options.Sae = None,
    layers: options.Layers = None,
    sample: Annotated[
        int | None,
        typer.Option("--sample", help="Only so many documents, drawn evenly. Default: all; of the lab 1000.", min=1),
    ] = None,
    reading: CorpusOptions = PARAGRAPHS,
    row: Annotated[
        int | None, typer.Option("--row", help="Read long documents in pieces of so many tokens. Default: whole.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="At most so many tokens per document. Default: all.")
    ] = None,
    window: Annotated[int, typer.Option("--window", help="Tokens written at once: what a stop loses at most.")] = 2**15,
    batch: Annotated[int, typer.Option("--batch", help="Tokens per forward pass, padding included.")] = 4096,
    skip_special: options.SkipSpecial = False,
    sinks: options.Sinks = None,
    pool: Annotated[str | None, typer.Option("--pool", help="Also keep residuals per document: mean, last.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    k: options.K = None,
    as_json: options.Json = False,
) -> None:
    """Write which features fire on which tokens of a corpus, for any set of layers in one pass.

    Stopped in whatever way, the same command goes on where it was. Rows that can't be read are counted and listed in
    the store. Ask the store with: qwen-scope store STORE
    """
    import torch

    from qwen_scope.files import not_onto_itself
    from qwen_scope.model import LoadedModel
    from qwen_scope.scope import ExtractOptions
    from qwen_scope.scope import extract as run

    chosen = ExtractOptions(
        row_tokens=row,
        max_tokens=max_tokens,
        window_tokens=window,
        batch_tokens=batch,
        chat=reading.chat,
        skip_special=skip_special,
        sink_multiple=sinks,
        pool=tuple(part.strip() for part in pool.split(",")) if pool else (),
    )
    not_onto_itself(out, *options.files(source), *options.folders(model, sae))
    corpus = options.read(source, reading, LAB_DOCUMENTS)
    with output.status("opening the model"):
        scope = options.open_scope(model, sae, device, dtype, k)
    wanted = scope.check_layers(options.parse_layers(layers))
    # Memory-mapped: each comes to the device for its turn.
    on_disk = type(scope.saes)(scope.saes.source, d_model=scope.d_model, k=k, dtype=scope.saes.dtype)
    on_disk.tell(scope.joined.meet)
    saes = {layer: on_disk[layer] for layer in wanted}
    place = None if torch.device(scope.saes.device).type == "cpu" else scope.saes.device
    loaded = LoadedModel(scope.model, scope.tokenizer, model)
    with output.progress() as bar:
        report, source = reporting(bar), scope.saes.source
        store = run(corpus, loaded, saes, out, chosen, report, sae_device=place, sae_source=source)
    with store:
        show_store(store, as_json)


def reporting(bar: output.Report) -> Callable[[Progress], None]:
    """What to call with the progress of an extraction, so that a bar shows it."""

    def report(now: Progress) -> None:
        rate = f"{now.tokens:,} tokens, {now.tokens_per_second:,.0f}/s" if now.stage == "reading" else ""
        bad = f", {now.unreadable} unreadable" if now.unreadable else ""
        bar(now.stage, now.share or 0.0, rate + bad)

    return report


def show_store(store: FeatureStore, as_json: bool) -> None:
    """What a store holds."""
    from qwen_scope.report import size

    manifest = store.manifest
    total = sum(part.bytes for part in manifest.parts)
    per = {
        table: sum(part.bytes for part in manifest.parts if part.table == table)
        / max(1, sum(info.activations for info in manifest.layers.values()))
        for table in ("activations", "features")
    }
    layers: list[dict[str, Any]] = []
    for layer in store.layers:
        info = store.layer(layer)
        firing = int((store.stats(layer)["tokens"].to_numpy() > 0).sum())
        layers.append(
            {
                "layer": layer,
                "sae": info.group,
                "d_sae": info.d_sae,
                "tokens": info.tokens,
                "activations": info.activations,
                "firing": firing,
            }
        )
    if as_json:
        output.print_json(
            {
                "store": str(store.folder),
                "model": manifest.model,
                "documents": manifest.documents,
                "tokens": manifest.tokens,
                "bytes": total,
                "bytes_per_activation": per,
                "unreadable": manifest.unreadable,
                "layers": layers,
            }
        )
        return
    title = f"{store.folder}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {size(total)}"
    columns = ("layer", "features", "firing", "tokens", "activations", "SAE")
    output.show(
        title,
        columns,
        [tuple(r[n] for n in ("layer", "d_sae", "firing", "tokens", "activations", "sae")) for r in layers],
    )
    if manifest.unreadable:
        output.show("Rows that could not be read", ("reason", "rows"), manifest.unreadable.items())

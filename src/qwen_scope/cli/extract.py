"""`qwen-scope extract`: the features of a corpus into a store."""

from __future__ import annotations

from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_scope.cluster import WorkerOptions
from qwen_scope.errors import InputError, need
from qwen_scope.scope import ScopeOptions
from qwen_scope.text import CorpusOptions

from . import options, output
from .groups import PARAGRAPHS, grouped
from .workers import WORKERS, runner_of

if TYPE_CHECKING:
    from qwen_scope.cluster import Torchrun
    from qwen_scope.scope import Engine, ExtractOptions, Scope
    from qwen_scope.store import FeatureStore

LAB_DOCUMENTS = 1000


class Reads(StrEnum):
    """What turns rows of tokens into residuals."""

    transformers = "transformers"
    vllm = "vllm"


SCOPE = ScopeOptions()


@grouped
def extract(
    source: options.Documents,
    out: Annotated[Path, typer.Option("--out", "-o", help="The store to write; an unfinished one goes on.")],
    asked: ScopeOptions = SCOPE,
    layers: options.Layers = None,
    sample: Annotated[
        int | None,
        typer.Option("--sample", help="Only this many documents, drawn evenly. Default: all; of the lab 1000.", min=1),
    ] = None,
    reading: CorpusOptions = PARAGRAPHS,
    row: Annotated[
        int | None, typer.Option("--row", help="Read long documents in pieces of this many tokens. Default: whole.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="At most this many tokens per document. Default: all.")
    ] = None,
    window: Annotated[int, typer.Option("--window", help="Tokens written at once: what a stop loses at most.")] = 2**15,
    batch: Annotated[int, typer.Option("--batch", help="Tokens per forward pass, padding included.")] = 4096,
    phase: options.Phase = None,
    engine: Annotated[
        Reads, typer.Option("--engine", help="What reads the corpus: transformers, or vLLM (faster on a GPU).")
    ] = Reads.transformers,
    share: Annotated[
        str | None,
        typer.Option("--share", help="Only this share, such as 3/16: one job of many; join them with store merge."),
    ] = None,
    spread: WorkerOptions = WORKERS,
    pool: Annotated[str | None, typer.Option("--pool", help="Also keep residuals per document: mean, last.")] = None,
    as_json: options.Json = False,
) -> None:
    """Write which features fire on which tokens of a corpus, for any set of layers in one pass.

    Stopped in whatever way, the same command goes on where it was. Rows that can't be read are counted and listed in
    the store. Ask the store with: qwen-scope store STORE
    """
    from qwen_scope.files import not_onto_itself
    from qwen_scope.scope import ExtractOptions

    chosen = ExtractOptions(
        row_tokens=row,
        max_tokens=max_tokens,
        window_tokens=window,
        batch_tokens=batch,
        chat=reading.chat,
        counted=asked.counted,
        phases=options.check_phases(phase),
        pool=tuple(part.strip() for part in pool.split(",")) if pool else (),
    )
    not_onto_itself(out, *options.files(source), *options.folders_of(asked))
    ranks = ranks_of(spread)
    runner = runner_of(spread, asked)
    if spread.on is not None and engine is not Reads.transformers:
        raise InputError("workers read with transformers; leave --engine out, or --on")
    corpus = options.read(source, reading, LAB_DOCUMENTS, options.parse_share(share))
    if engine is Reads.vllm:
        need("--engine vllm", "vllm")
        if asked.adapter is not None:
            raise InputError("--engine vllm reads whole models; merge the adapter into its model and name that")
    scope = options.open_asked(asked)
    reads = engine_of(engine, scope, chosen)
    wanted = options.parse_layers(layers)
    if ranks is not None and ranks.rank:
        ranks.follow(scope, corpus)
        return
    with nullcontext(runner) if ranks is None else ranks.reading(scope) as runs, output.progress() as bar:
        store = scope.extract(corpus, out, chosen, layers=wanted, engine=reads, runner=runs, progress=bar)
    with store:
        show_store(store, as_json)


def ranks_of(spread: WorkerOptions) -> Torchrun | None:
    """This process's part among those that torchrun started; None where it is not asked for."""
    if spread.on != "torchrun":
        return None
    from qwen_scope.cluster import Torchrun

    return Torchrun()


def engine_of(named: Reads, scope: Scope, chosen: ExtractOptions) -> Engine | None:
    """The engine of an extraction; None for forward passes of the scope's own model."""
    if named is Reads.transformers:
        return None
    from qwen_scope.serve import VllmEngine

    return VllmEngine.of(scope.loaded, batch_tokens=chosen.batch_tokens, row_tokens=chosen.row_tokens)


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
    left_out = store.left_out()
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
                "left_out": left_out.get(layer, {}),
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
    columns = ("layer", "features", "firing", "tokens", "left out", "activations", "SAE")
    output.show(
        title,
        columns,
        [
            (r["layer"], r["d_sae"], r["firing"], r["tokens"], sum(r["left_out"].values()), r["activations"], r["sae"])
            for r in layers
        ],
    )
    say_left_out(store, left_out)
    if manifest.unreadable:
        output.show("Rows that could not be read", ("reason", "rows"), manifest.unreadable.items())


def say_left_out(store: FeatureStore, left_out: dict[int, dict[str, int]]) -> None:
    """A line on the tokens that do not count; layers differ in their sinks alone."""
    from rich.text import Text

    reasons: dict[str, list[int]] = {}
    for layer in store.layers:
        for reason, tokens in left_out.get(layer, {}).items():
            reasons.setdefault(reason, []).append(tokens)
    said = [f"{span(tokens)} {reason}" for reason, tokens in reasons.items()]
    counted = store.manifest.counted
    sample = f" ({counted.sample})" if counted is not None and "too few" in counted.sample else ""
    total = f"{store.manifest.tokens:,} tokens"
    output.console().print(Text(f"left out per layer: {', '.join(said) or 'none'} of {total}{sample}"))


def span(tokens: list[int]) -> str:
    """The smallest and the largest of some counts."""
    low, high = min(tokens), max(tokens)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"

"""`extract`: a corpus through a model and its SAEs into a store; it can be stopped at any point."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from qwen_scope.errors import InputError, MismatchError
from qwen_scope.model import HookPoint, LoadedModel, TokenMask, context_length, d_model
from qwen_scope.sae import SAE
from qwen_scope.store import FeatureStore, LayerInfo, StoreWriter, place_of
from qwen_scope.text import Corpus, start_ids

from .encoding import HOLD_BYTES, Pieces, Reader, State, encode_window, median_norms, points_of

# Rows of a model that states no context.
LONGEST_ROW = 2**20
FIRST_WINDOW = 2**11
LONGEST_WINDOW = 30.0  # seconds; a window that took longer is the largest
POOLINGS = ("mean", "last")


@dataclass(frozen=True)
class ExtractOptions:
    """How a corpus is read. Every field but `batch_tokens` decides what the store says; that one moves last digits.

    Attributes:
        row_tokens: longer documents are read in pieces of so many tokens; None for the model's context.
        max_tokens: at most so many tokens of a document; the rest is cut, and counted.
        window_tokens: documents are sorted by length within windows of about so many tokens. A window is also what a
            stopped run loses at most. The first is of 2,048 tokens and each further one twice as large, up to this size
            or until one takes half a minute; where `sink_multiple` needs a median, all are of this size.
        batch_tokens: tokens per forward pass, padding included.
        chat: render documents with the chat template: `default`, `thinking` or `non_thinking`.
        skip_special: leave out tokens the tokenizer calls special.
        sink_multiple: leave out tokens whose residual norm at a layer is above so many times the median norm there,
            taken over the first window; None leaves none out.
        pool: also keep one residual per document and layer: `mean`, `last` or both.

    Raises:
        InputError: a value that makes no sense.
    """

    row_tokens: int | None = None
    max_tokens: int | None = None
    window_tokens: int = 2**15
    batch_tokens: int = 4096
    chat: str | None = None
    skip_special: bool = False
    sink_multiple: float | None = None
    pool: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("row_tokens", "max_tokens", "window_tokens", "batch_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} is at least 1, not {value}")
        TokenMask(sink_multiple=self.sink_multiple)
        if unknown := [name for name in self.pool if name not in POOLINGS]:
            raise InputError(f"residuals are pooled by {' or '.join(POOLINGS)}, not {unknown[0]!r}")


@dataclass(frozen=True)
class Progress:
    """Where an extraction stands.

    Attributes:
        stage: `reading` or `indexing`.
        documents, tokens: in the store or on their way there.
        tokens_per_second: of this run.
        share: how much of the corpus is read, from 0 to 1, or None where its size is not known.
        unreadable: rows that could not be used.
    """

    stage: str
    documents: int
    tokens: int
    tokens_per_second: float
    share: float | None
    unreadable: int


def extract(
    corpus: Corpus,
    loaded: LoadedModel,
    saes: Mapping[int, SAE],
    folder: str | os.PathLike[str],
    options: ExtractOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
    *,
    sae_device: torch.device | str | None = None,
    sae_source: str | None = None,
    hold_bytes: int = HOLD_BYTES,
) -> FeatureStore:
    """Write the features of every token of a corpus into a store, and open it.

    A run that was stopped, in whatever way, is repeated with the same arguments and goes on after its last whole
    window; the finished folder is the same, byte for byte, as that of a run nobody disturbed (with the same packages
    on the same machine). A folder that is already finished is opened at once.

    Args:
        saes: the layers to read, each with its SAE.
        folder: where the store goes.
        progress: called after every forward pass.
        sae_device: where encoding happens. Each SAE comes there for its turn and the next one is on its way meanwhile,
            so memory-mapped SAEs of all layers can be swept with at most two of them there; None leaves them where
            they are.
        sae_source: the name or the folder of the SAEs, kept with the store so that later commands find them.
        hold_bytes: about so many bytes of residuals wait for the turns of their SAEs, or one batch of them: more means
            fewer turns. Like `batch_tokens`, it moves last digits only.

    Raises:
        InputError: no document, options that do not fit, a folder that holds something else, or a full disk.
        MismatchError: an SAE of another width than the model, or of another layer.
        NotFoundError: a layer the model does not have.
    """
    options = options or ExtractOptions()
    infos = [layer_info(layer, sae, loaded) for layer, sae in sorted(saes.items())]
    if not infos:
        raise InputError("name at least one layer to extract")
    if corpus.endless:
        raise InputError(f"{corpus.name} has no end; say how many documents to read with sample")
    context, lead = context_length(loaded.model), len(start_ids(loaded.tokenizer))
    room = None if context is None else max(1, context - lead)
    row_tokens = min(limit for limit in (options.row_tokens, room, LONGEST_ROW) if limit is not None)
    request = {**asdict(options), "row_tokens": row_tokens, "corpus": corpus.description}
    request["dtype"] = str(loaded.model.dtype).removeprefix("torch.")
    request["sae_dtypes"] = sorted({str(sae.dtype).removeprefix("torch.") for sae in saes.values()})
    sources = {"model": place_of(loaded.name, Path(folder))}
    if sae_source is not None:
        sources["saes"] = place_of(sae_source, Path(folder))
    with StoreWriter(folder, loaded.name, request, infos, sources) as writer:
        if not writer.finished:
            run_windows(corpus, loaded, saes, options, row_tokens, writer, progress, sae_device, hold_bytes)
    return FeatureStore(folder, saes)


def run_windows(
    corpus: Corpus,
    loaded: LoadedModel,
    saes: Mapping[int, SAE],
    options: ExtractOptions,
    row_tokens: int,
    writer: StoreWriter,
    progress: Callable[[Progress], None] | None,
    sae_device: torch.device | str | None,
    hold_bytes: int,
) -> None:
    """Every window that is not in the store yet, then the index."""
    state = State(**writer.state) if writer.state else State(cursor=corpus.cursor())
    reader = Reader(corpus, loaded, state, row_tokens, options.max_tokens, options.chat)
    begun, before = time.monotonic(), writer.counts["tokens"]
    mask = TokenMask.of(loaded.tokenizer, options.skip_special, options.sink_multiple)

    def report(stage: str, done: int) -> None:
        if progress is not None:
            rate = (done - before) / max(1e-9, time.monotonic() - begun)
            bad = sum(writer.unreadable.values()) + len(reader.unreadable)
            share = corpus.progress if stage == "reading" else 1.0
            progress(Progress(stage, reader.documents, done, rate, share, bad))

    while True:
        size, since = window_size(reader.state, options), time.monotonic()
        pieces: Pieces = reader.window(size)
        if not pieces.rows and not pieces.unreadable:
            break
        medians = reader.state.medians
        if options.sink_multiple is not None and not medians and pieces.rows:
            medians = median_norms(loaded.model, points_of(saes), pieces, options.batch_tokens)
        done = writer.counts["tokens"]
        window, carried = encode_window(
            loaded.model,
            saes,
            pieces,
            mask=mask,
            medians={int(layer): norm for layer, norm in medians.items()},
            batch_tokens=options.batch_tokens,
            pool=options.pool,
            carried=reader.state.carried,
            report=lambda tokens, done=done: report("reading", done + tokens),
            device=sae_device,
            hold_bytes=hold_bytes,
        )
        size = size if time.monotonic() - since > LONGEST_WINDOW else 2 * size
        reader.state = State(**{**asdict(pieces.after), "medians": medians, "carried": carried, "window": size})
        writer.add(window, asdict(reader.state))
    if not writer.counts["tokens"]:
        said = ", ".join(f"{n} {reason}" for reason, n in writer.unreadable.items())
        unreadable = f" (unreadable rows: {said})" if said else ""
        raise InputError(f"there is no document to extract in {corpus.name}{unreadable}{corpus.other_columns()}")
    report("indexing", writer.counts["tokens"])
    writer.finish({int(layer): norm for layer, norm in reader.state.medians.items()})


def window_size(state: State, options: ExtractOptions) -> int:
    """How many tokens the next window has: few at first, so that a run that is stopped early has something to go on."""
    if options.sink_multiple is not None or (state.tokens and not state.window):
        return options.window_tokens  # a median wants a full window; a run of an earlier version goes on as it began
    return min(state.window or FIRST_WINDOW, options.window_tokens)


def layer_info(layer: int, sae: SAE, loaded: LoadedModel) -> LayerInfo:
    """A layer of the store, if the SAE belongs there."""
    if sae.d_model != (width := d_model(loaded.model)):
        raise MismatchError(f"the SAE {sae.identity} reads {sae.d_model} dimensions and {loaded.name} has {width}")
    if sae.identity.layer not in (None, layer):
        raise MismatchError(f"the SAE {sae.identity} is not for layer {layer}")
    return LayerInfo(
        layer=layer,
        hook_point=str(HookPoint.read_by(sae.hook_point, layer)),
        group=sae.identity.group,
        fingerprint=sae.identity.fingerprint,
        d_sae=sae.d_sae,
        k=sae.k,
        architecture=sae.architecture,
    )

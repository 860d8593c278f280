"""`extract`: a corpus through a model and its SAEs into a store; it can be stopped at any point."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from qwen_scope.errors import InputError, MismatchError
from qwen_scope.model import HookPoint, LoadedModel, context_length, counted_of, d_model, measure_counted
from qwen_scope.report import Progress as Told
from qwen_scope.sae import SAE
from qwen_scope.store import MERGED, FeatureStore, LayerInfo, StoreWriter, kept_counted, place_of
from qwen_scope.text import LEAST, NO_CHAT, Chat, Corpus, Counted, phase_numbers, start_ids

from .encoding import HOLD_BYTES, elsewhere, encode_window, points_of
from .engine import Engine, ModelEngine
from .job import FIRST_WINDOW, Job, Runner
from .rows import Pieces, Reader, State

# Rows of a model that states no context.
LONGEST_ROW = 2**20
SAMPLE_TOKENS = 6000  # that which tokens count is measured on: two windows
PACKED = 512  # tokens of a row of that sample
LONGEST_WINDOW = 30.0  # seconds; a window that took longer is the largest
POOLINGS = ("mean", "last")


@dataclass(frozen=True)
class ExtractOptions:
    """How a corpus is read. Every field but `batch_tokens` decides what the store says; that one moves last digits.

    Attributes:
        row_tokens: tokens per piece of a longer document; None for the model's context.
        max_tokens: tokens of a document that are read at most; the rest is cut, and counted.
        window_tokens: documents are sorted by length within windows of about this many tokens. A window is also what a
            stopped run loses at most. The first is of 2,048 tokens and each further one twice as large, up to this size
            or until one takes half a minute.
        batch_tokens: tokens per forward pass, padding included.
        chat: render documents with the chat template: `default`, `thinking` or `non_thinking`.
        counted: which tokens count; the others have no activations and are not pooled, but stay in the store with the
            reason. None for what the SAEs' files say, or where they say nothing, all but first tokens, special ones
            and sinks by thresholds measured on the first documents.
        phases: only tokens of these phases of a conversation count.
        pool: also keep one residual per document and layer: `mean`, `last` or both.

    Raises:
        InputError: a value that makes no sense.
    """

    row_tokens: int | None = None
    max_tokens: int | None = None
    window_tokens: int = 2**15
    batch_tokens: int = 4096
    chat: Chat | None = None
    counted: Counted | None = None
    phases: Sequence[str] | None = None
    pool: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("row_tokens", "max_tokens", "window_tokens", "batch_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} is at least 1, not {value}")
        if self.phases is not None:
            phase_numbers(self.phases)
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


def telling(progress: Told) -> Callable[[Progress], None]:
    """What `extract` calls, so that `progress` is told stage, share and a few words."""

    def tell(now: Progress) -> None:
        rate = f"{now.tokens:,} tokens, {now.tokens_per_second:,.0f}/s" if now.stage == "reading" else ""
        bad = f", {now.unreadable} unreadable" if now.unreadable else ""
        progress(now.stage, now.share or 0.0, rate + bad)

    return tell


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
    engine: Engine | None = None,
    runner: Runner | None = None,
) -> FeatureStore:
    """Write the features of every token of a corpus into a store, and open it.

    A run that was stopped, in whatever way, is repeated with the same arguments and goes on after its last whole
    window; the finished folder is the same, byte for byte, as that of a run nobody disturbed (with the same packages
    on the same machine). A folder that is already finished is opened at once.

    A corpus that is a share (`rank` and `world`) gives a store of that share; `store.merge` makes one of them all.
    Which tokens count is measured on the whole corpus, so that all shares agree.

    Args:
        saes: the layers to read, each with its SAE.
        folder: where the store goes; also a URI, such as `s3://bucket/store`.
        progress: called after every forward pass.
        sae_device: where encoding happens. Each SAE comes there for its turn and the next one is on its way meanwhile,
            so memory-mapped SAEs of all layers can be swept with at most two of them there; None leaves them where
            they are.
        sae_source: the name or the folder of the SAEs, kept with the store so that later commands find them.
        hold_bytes: about how many bytes of residuals wait for the turns of their SAEs, or one batch of them: more means
            fewer turns. Like `batch_tokens`, it moves last digits only.
        engine: what reads the residuals; by default forward passes of the model. Which tokens count is measured with
            the model in any case.
        runner: where windows are read and encoded, such as `cluster.RayRunner`; by default here.

    Raises:
        InputError: no document, options that do not fit, a folder with other content, or a full disk.
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
    run = Extraction(
        corpus, loaded, saes, options, row_tokens, engine or ModelEngine(loaded.model, options.batch_tokens)
    )
    counted, by = run.which_count(folder)
    if options.phases is not None:
        counted = replace(counted, phases=frozenset(options.phases))
    request = {**asdict(replace(options, counted=None)), "counted": counted.to_json(), "counted_by": by}
    request |= {"row_tokens": row_tokens, "corpus": corpus.description}
    request["dtype"] = str(loaded.model.dtype).removeprefix("torch.")
    request["sae_dtypes"] = sorted({str(sae.dtype).removeprefix("torch.") for sae in saes.values()})
    sources = {"model": place_of(loaded.name, folder)}
    if sae_source is not None:
        sources["saes"] = place_of(sae_source, folder)
    with StoreWriter(folder, loaded.name, request, infos, sources) as writer:
        if not writer.finished:
            tell = telling_of(run, writer, progress)
            if runner is None:
                run_windows(run, counted, writer, tell, sae_device, hold_bytes)
            else:
                spread_windows(run.job(counted, writer, hold_bytes), runner, writer, tell)
            finish(run, writer, tell)
    return FeatureStore(folder, saes)


class Extraction:
    """What is read, and with what; windows that were read to measure which tokens count are not read again."""

    def __init__(
        self,
        corpus: Corpus,
        loaded: LoadedModel,
        saes: Mapping[int, SAE],
        options: ExtractOptions,
        row_tokens: int,
        engine: Engine,
    ) -> None:
        self.corpus, self.loaded, self.saes, self.options = corpus, loaded, saes, options
        self.begin = corpus.cursor()
        self.row_tokens, self.engine = row_tokens, engine
        self.reader: Reader | None = None
        self.held: deque[tuple[int, Pieces]] = deque()

    def which_count(self, folder: str | os.PathLike[str]) -> tuple[Counted, str]:
        """Which tokens count, and whether that was `given`, is what the `saes` say, or is `measured`.

        A folder that was begun with a measured one keeps it.
        """
        if self.options.counted is not None:
            return self.options.counted, "given"
        if (trained := counted_of(self.saes.values())) is not None:
            return trained, "saes"
        if (kept := kept_counted(folder)) is not None:
            return kept, "measured"
        shared = self.corpus.world > 1
        corpus = self.corpus.whole() if shared else self.corpus
        reader = self._reader(corpus, State(cursor=corpus.cursor()), Counted())
        size, tokens = FIRST_WINDOW, 0
        while tokens < SAMPLE_TOKENS:
            size = min(size, self.options.window_tokens)
            pieces = reader.window(size)
            if not pieces.rows and not pieces.unreadable:
                break
            self.held.append((size, pieces))
            tokens += sum(len(row.ids) for row in pieces.rows)
            size *= 2
        rows = [row.lead + row.ids for _, pieces in self.held for row in pieces.rows]
        if shared:
            self.held.clear()
        else:
            self.reader = reader
        return measured(self.loaded, rows, list(points_of(self.saes).values()), self.corpus.name), "measured"

    def open(self, state: State, counted: Counted) -> Reader:
        """The reader of the corpus, from a state on."""
        if self.reader is None or not self.held:
            self.reader = self._reader(self.corpus, state, counted)
        return self.reader

    def state(self, writer: StoreWriter) -> State:
        """From where on windows are still to be read.

        Raises:
            InputError: the folder holds something else than an extraction.
        """
        if writer.state is None:
            return State(cursor=self.begin)
        if MERGED in writer.state:
            raise InputError(
                f"{writer.folder} is a store half merged of shares; finish it with qwen-scope store merge and the same"
                " shares, or name a new folder"
            )
        return State(**writer.state)

    def job(self, counted: Counted, writer: StoreWriter, hold_bytes: int) -> Job:
        """What is left to do, for a runner.

        Raises:
            InputError: the corpus can be read only once.
        """
        options, state = self.options, self.state(writer)
        if self.corpus.once:
            raise InputError(f"{self.corpus.name} can be read only once, and workers read it again; make a list of it")
        return Job(
            self.corpus, self.loaded.tokenizer, state, writer.windows, options.window_tokens, self.row_tokens,
            options.max_tokens, options.chat, counted.phases is not None or options.phases is not None, counted,
            options.pool, options.batch_tokens, {layer: sae.identity.fingerprint for layer, sae in self.saes.items()},
            writer.folder.absolute(), hold_bytes,
        )  # fmt: skip

    def _reader(self, corpus: Corpus, state: State, counted: Counted) -> Reader:
        options = self.options
        need_phases = counted.phases is not None or options.phases is not None
        return Reader(
            corpus, self.loaded.tokenizer, state, self.row_tokens, options.max_tokens, options.chat, need_phases
        )


def measured(loaded: LoadedModel, rows: Sequence[list[int]], points: Sequence[HookPoint], name: str) -> Counted:
    """All tokens but first ones, special ones and sinks, by thresholds from the rows packed one behind the other.

    Too few tokens for thresholds leave sinks at later places in, which the sample says.
    """
    bare, start = Counted.of(loaded.tokenizer), start_ids(loaded.tokenizer)
    ids = [i for row in rows for i in (row[len(start) :] if start and row[: len(start)] == start else row)]
    if len(ids) - sum(i in bare.special for i in ids) < 2 * LEAST:
        return replace(bare, sample=f"{name}: too few tokens to measure thresholds for sinks on")
    room = min(PACKED, context_length(loaded.model) or PACKED) - len(start)
    packed = [torch.tensor([[*start, *ids[at : at + room]]]) for at in range(0, len(ids), room)]
    return measure_counted(loaded.model, loaded.tokenizer, packed, points, sample=name)


Tell = Callable[[str, int, int, int], None]
"""Told a stage, and the documents, tokens and unreadable rows up to here."""


def telling_of(run: Extraction, writer: StoreWriter, progress: Callable[[Progress], None] | None) -> Tell:
    """What calls `progress` with where an extraction stands."""
    begun, before = time.monotonic(), writer.counts["tokens"]

    def tell(stage: str, documents: int, tokens: int, unreadable: int) -> None:
        if progress is not None:
            rate = (tokens - before) / max(1e-9, time.monotonic() - begun)
            share = run.corpus.progress if stage == "reading" else 1.0
            progress(Progress(stage, documents, tokens, rate, share, unreadable))

    return tell


def run_windows(
    run: Extraction,
    counted: Counted,
    writer: StoreWriter,
    tell: Tell,
    sae_device: torch.device | str | None,
    hold_bytes: int,
) -> None:
    """Every window that is not in the store yet, here."""
    options, state = run.options, run.state(writer)
    reader = run.open(state, counted)
    carried, size = state.carried, min(state.window or FIRST_WINDOW, options.window_tokens)
    while True:
        since = time.monotonic()
        size, pieces = run.held.popleft() if run.held else (size, reader.window(size))
        if not pieces.rows and not pieces.unreadable:
            break
        done, documents = writer.counts["tokens"], pieces.after.documents
        bad = sum(writer.unreadable.values()) + len(pieces.unreadable)
        window, carried = encode_window(
            run.engine,
            run.saes,
            pieces,
            counted=counted,
            pool=options.pool,
            carried=carried,
            report=lambda tokens, at=(documents, done, bad): tell("reading", at[0], at[1] + tokens, at[2]),
            at_once=lambda: isinstance(run.engine, ModelEngine) and elsewhere(run.loaded.model, run.saes, sae_device),
            device=sae_device,
            hold_bytes=hold_bytes,
        )
        if run.held:
            size = run.held[0][0]
        elif time.monotonic() - since <= LONGEST_WINDOW:
            size = min(2 * size, options.window_tokens)
        writer.add(window, asdict(replace(pieces.after, carried=carried, window=size)))


def spread_windows(job: Job, runner: Runner, writer: StoreWriter, tell: Tell) -> None:
    """Every window that is not in the store yet, wherever a runner has them read; kept in their order."""
    waiting: dict[int, dict[str, Any]] = {}
    for number, written in runner.run(job):
        waiting[number] = written
        while (there := waiting.pop(writer.windows, None)) is not None:
            writer.keep(there, there["state"])
            counts = writer.counts
            tell("reading", counts["documents"], counts["tokens"], sum(writer.unreadable.values()))
    if waiting:
        raise InputError(
            f"window {writer.windows} of {writer.folder} was not written and later ones were; run the same command"
            " again"
        )


def finish(run: Extraction, writer: StoreWriter, tell: Tell) -> None:
    """The index, once every window is in the store.

    Raises:
        InputError: there is no document.
    """
    counts, corpus = writer.counts, run.corpus
    if not counts["tokens"] and corpus.world == 1:  # a share may be empty: the others have the documents
        said = ", ".join(f"{n} {reason}" for reason, n in writer.unreadable.items())
        unreadable = f" (unreadable rows: {said})" if said else ""
        unreadable += "; pass chat='default' to read conversations" if NO_CHAT in writer.unreadable else ""
        raise InputError(f"there is no document to extract in {corpus.name}{unreadable}{corpus.other_columns()}")
    tell("indexing", counts["documents"], counts["tokens"], sum(writer.unreadable.values()))
    writer.finish()


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

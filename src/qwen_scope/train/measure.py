"""Measuring finished SAEs by name: on the model they were trained on, and on another checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

import torch

from qwen_scope.errors import InputError, check_count
from qwen_scope.model import HookPoint, LoadedModel, counted_of, load_model, measure_counted
from qwen_scope.sae import SAE, layers_of, load_sae
from qwen_scope.scope import Joined, model_source
from qwen_scope.text import Chat, Corpus, Counted, TokenRows

from .evaluate import Quality, evaluate
from .held_out import HeldOut, held_out_of
from .transfer import Transfer, transfer

ROW, ROWS, TOKENS = 256, 16, 65536


@dataclass(frozen=True)
class EvalRun:
    """What an evaluation is told.

    Attributes:
        model: `lab`, or folder or Hub id of the language model.
        sae: group, folder or Hub id of the SAEs.
        data: where the text is, as `Corpus` takes it. Of the text that the SAEs were trained on, as their files tell,
            the documents that were kept out of training are read, as the run that made them read them.
        hold_out: read one document in so many, those that training with this `hold_out` does not see; 0 reads all; None
            decides as `data` says.
        post: another checkpoint of the same model: also report how the SAEs do there.
        layers: None means all that the group has.
        tokens: about how many to measure on; None means as many as the run measured on, or 65,536.
        column, unit, sample, split, subset: of the data, as `Corpus` takes them; the sample is drawn by the run's seed.
        chat: render conversations with the chat template, in this mode; None means as the run did, or not.
        row, rows: tokens per row, and rows per forward pass; None means those of the run, or 256 and 16.
        loss: measure what the model's predictions lose, too.
        counted: which tokens count. None means those that the SAEs' files say; where these say none, all but the first
            token of each row, special tokens, and sinks by thresholds measured on the first rows.
        dtype, device: of the language models.
        seed: of the resampling of the transfer report.
    """

    model: str
    sae: str
    data: str
    post: str | None = None
    layers: tuple[int, ...] | None = None
    hold_out: int | None = None
    tokens: int | None = None
    column: str = "text"
    unit: str = "paragraph"
    sample: int | None = None
    split: str = "train"
    subset: str | None = None
    chat: Chat | None = None
    row: int | None = None
    rows: int | None = None
    loss: bool = True
    counted: Counted | None = None
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"tokens": 2, "row": 2, "rows": 1, "hold_out": 0, "seed": 0}.items():
            if (value := getattr(self, name)) is not None:
                check_count(name, value, least)


@dataclass(frozen=True)
class EvalResult:
    """What was measured.

    Attributes:
        quality: by hook point.   transfer: by hook point; empty without another checkpoint.
        counted: which tokens counted.
        held_out: one document in so many was read, those that training kept out; 0 where all were.
    """

    quality: dict[HookPoint, Quality]
    transfer: dict[HookPoint, Transfer]
    counted: Counted
    held_out: int


def run_eval(run: EvalRun, progress: Callable[[str, float], None] | None = None) -> EvalResult:
    """Measure a group of SAEs on a model, and on another checkpoint of it if one is named.

    Raises:
        QwenScopeError: with one sentence, before the model runs where the cause can be known before.
    """
    loaded = load_model(model_source(run.model), device=run.device, dtype=run.dtype)
    saes = saes_of(run, loaded)
    corpus, reading = corpus_of(run, saes)
    rows = rows_of(run, reading, corpus, loaded)
    counted = run.counted or counted_of(saes.values())
    if counted is None:
        counted = measure_counted(loaded.model, loaded.tokenizer, rows, saes, sample=corpus.name)
    post = post_of(run, loaded, saes)
    quality = evaluate(loaded.model, saes, rows, loss=run.loss, counted=counted, progress=progress)
    moved = (
        {}
        if post is None
        else transfer(loaded.model, post.model, saes, rows, counted=counted, seed=run.seed, progress=progress)
    )
    return EvalResult(quality, moved, counted, corpus.hold_out)


def saes_of(run: EvalRun, loaded: LoadedModel) -> dict[HookPoint, SAE]:
    """The SAEs of the chosen layers, on the model's device."""
    layers = layers_of(run.sae) if run.layers is None else list(run.layers)
    joined = Joined(loaded, run.sae)
    saes = [(layer, joined.meet(layer, load_sae(run.sae, layer, device=loaded.model.device))) for layer in layers]
    return {HookPoint.read_by(sae.hook_point, layer): sae for layer, sae in saes}


def post_of(run: EvalRun, loaded: LoadedModel, saes: Mapping[HookPoint, SAE]) -> LoadedModel | None:
    """The other checkpoint, if one is named and the SAEs can be carried over to it.

    Raises:
        InputError: it splits text in another way.   MismatchError: it has another shape.
    """
    if run.post is None:
        return None
    post = load_model(model_source(run.post), device=run.device, dtype=run.dtype)
    if post.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise InputError(f"{run.model} and {run.post} split text differently, so their tokens can't be compared")
    joined = Joined(post, run.sae, variants=False)
    for point, sae in saes.items():
        joined.meet(point.layer, sae)
    return post


def corpus_of(run: EvalRun, saes: Mapping[HookPoint, SAE]) -> tuple[Corpus, HeldOut | None]:
    """The documents to measure on, and the record of the run that kept them out of training, if they are its own."""

    def read(every: int) -> Corpus:
        # The lab's documents are those of its first seed, whatever is resampled.
        seed = 0 if run.sample is None else run.seed
        return Corpus(
            run.data, column=run.column, unit=run.unit, sample=run.sample, seed=seed, split=run.split,
            subset=run.subset, hold_out=every, held_out=every > 0,
        )  # fmt: skip

    known, whole = held_out_of(saes.values()), read(0)
    if known is None or not known.is_of(whole) or run.hold_out not in (None, known.every):
        return (read(run.hold_out) if run.hold_out else whole), None
    return read(known.every), known


def rows_of(run: EvalRun, reading: HeldOut | None, corpus: Corpus, loaded: LoadedModel) -> list[torch.Tensor]:
    """Batches of full rows of token ids, read as the run says, else as the record does."""
    row = run.row or (reading.row if reading else ROW)
    rows = run.rows or (reading.rows if reading else ROWS)
    tokens = run.tokens or (reading.tokens if reading else 0) or TOKENS
    chat = run.chat or (reading.chat if reading else None)
    packed = TokenRows(corpus, loaded.tokenizer, row=row, rows=rows, chat=chat)
    found = list(islice(packed, max(1, tokens // (row * rows))))
    if not found:
        raise InputError(f"the text of {run.data} does not fill one row of {row} tokens; lower row")
    return found

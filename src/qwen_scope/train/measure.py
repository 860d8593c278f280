"""Measuring finished SAEs by name: on the model they were trained on, and on another checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

import torch

from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, LoadedModel, counted_of, load_model, measure_counted
from qwen_scope.report import Progress
from qwen_scope.sae import SAE, layers_of, load_sae
from qwen_scope.scope import Joined, model_source, resolve
from qwen_scope.text import Corpus, Counted, TokenRows

from .evaluate import Quality, evaluate_saes
from .held_out import HeldOut, held_out_of, text_source
from .options import EvalRun, named
from .transfer import Transfer, transfer

CONTEXT_LENGTH, BATCH_SIZE, TOKENS = 256, 16, 65536


@dataclass(frozen=True)
class EvalResult:
    """What was measured.

    Attributes:
        sae: the group, folder or Hub id of the SAEs.
        quality: by hook point.   transfer: by hook point; empty without another checkpoint.
        counted: which tokens counted.
        held_out: every `held_out`-th document was read, those that training kept out; 0 where all were.
    """

    sae: str
    quality: dict[HookPoint, Quality]
    transfer: dict[HookPoint, Transfer]
    counted: Counted
    held_out: int


def run_eval(run: EvalRun, *, progress: Progress | None = None) -> EvalResult:
    """Measure a group of SAEs on a model, and on another checkpoint of it if one is named.

    Args:
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        QwenScopeError: with one sentence, before the model runs where the cause can be known before.
    """
    source = resolve(run.model, run.sae)[1]
    loaded = load_model(model_source(run.model), device=run.device, dtype=run.dtype)
    saes = saes_of(run, source, loaded)
    corpus, reading = documents_of(run, saes)
    rows = rows_of(run, reading, corpus, loaded)
    counted = run.counted or counted_of(saes.values())
    if counted is None:
        counted = measure_counted(loaded.model, loaded.tokenizer, rows, saes, sample=corpus.name)
    post = post_of(run, source, loaded, saes)
    quality = evaluate_saes(loaded.model, saes, rows, loss=run.loss, counted=counted, progress=progress)
    moved = (
        {}
        if post is None
        else transfer(loaded.model, post.model, saes, rows, counted=counted, seed=run.seed, progress=progress)
    )
    return EvalResult(source, quality, moved, counted, corpus.hold_out)


def saes_of(run: EvalRun, source: str, loaded: LoadedModel) -> dict[HookPoint, SAE]:
    """The SAEs of the chosen layers, on the model's device."""
    layers = layers_of(source) if run.layers is None else list(run.layers)
    joined = Joined(loaded, source)
    saes = [(layer, joined.meet(layer, load_sae(source, layer, device=loaded.model.device))) for layer in layers]
    return {HookPoint.read_by(sae.hook_point, layer): sae for layer, sae in saes}


def post_of(run: EvalRun, source: str, loaded: LoadedModel, saes: Mapping[HookPoint, SAE]) -> LoadedModel | None:
    """The other checkpoint, if one is named and the SAEs can be carried over to it.

    Raises:
        InputError: it splits text in another way.   MismatchError: it has another shape.
    """
    if run.post is None:
        return None
    post = load_model(model_source(run.post), device=run.device, dtype=run.dtype)
    if post.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise InputError(f"{run.model} and {run.post} split text differently, so their tokens can't be compared")
    joined = Joined(post, source, variants=False)
    for point, sae in saes.items():
        joined.meet(point.layer, sae)
    return post


def documents_of(run: EvalRun, saes: Mapping[HookPoint, SAE]) -> tuple[Corpus, HeldOut | None]:
    """The documents to measure on, and the record of the run that kept them out of training, if they are its own."""

    def read(every: int, order: int | None = None) -> Corpus:
        return Corpus.of(text_source(run.data), run.corpus, hold_out=every, held_out=every > 0, shuffle=order)

    known, whole = held_out_of(saes.values()), read(0)
    if known is None or not known.is_of(whole) or run.hold_out not in (None, known.every):
        return (read(run.hold_out) if run.hold_out else whole), None
    return read(known.every, known.shuffle), known


def rows_of(run: EvalRun, reading: HeldOut | None, corpus: Corpus, loaded: LoadedModel) -> list[torch.Tensor]:
    """Batches of full rows of token ids, read as the run says, else as the record does."""
    context_length = run.context_length or (reading.context_length if reading else CONTEXT_LENGTH)
    batch_size = run.batch_size or (reading.batch_size if reading else BATCH_SIZE)
    tokens = run.tokens or (reading.tokens if reading else 0) or TOKENS
    chat = run.corpus.chat or (reading.chat if reading else None)
    packed = TokenRows(corpus, loaded.tokenizer, context_length=context_length, batch_size=batch_size, chat=chat)
    found = list(islice(packed, max(1, tokens // (context_length * batch_size))))
    if not found:
        raise InputError(
            f"the text of {named(run.data)} does not fill one row of {context_length} tokens; lower context_length"
        )
    return found

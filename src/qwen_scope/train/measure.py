"""Measuring finished SAEs by name: on the model they were trained on, and on another checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, LoadedModel, counted_of, load_model, measure_counted, weights_fingerprint
from qwen_scope.report import HasFrames, Progress, Table
from qwen_scope.sae import SAE, layers_of, load_sae
from qwen_scope.scope import WORDS, Joined, Verdict, model_source, remember, resolve
from qwen_scope.text import Chat, Corpus, Counted, TokenRows

from .evaluate import Quality, evaluate_saes
from .fit import Fit, fit
from .held_out import HeldOut, held_out_of, text_source
from .options import EVAL_TOKENS, EvalRun
from .pair import measure_pair
from .pair_rows import document_rows
from .parallel import ALONE, Ranks, counted_of_first, join
from .transfer import Transfer, transferred

CONTEXT_LENGTH, BATCH_SIZE = 256, 16


@dataclass(frozen=True, repr=False)
class EvalResult(HasFrames):
    """What was measured.

    Attributes:
        sae: the group, folder or Hub id of the SAEs.
        quality: by hook point, on their own model; empty without one.
        transfer: by hook point; empty without another checkpoint or without their own.
        counted: which tokens counted.
        held_out: every `held_out`-th document was read, those that training kept out; 0 where all were.
        fits: whether the SAEs fit the other checkpoint, by hook point; empty without one or without losses.
        counted_post: which tokens counted on the other checkpoint, with its own thresholds.
        remembered: the files that keep the verdicts.
    """

    sae: str
    quality: dict[HookPoint, Quality]
    transfer: dict[HookPoint, Transfer]
    counted: Counted
    held_out: int
    fits: dict[HookPoint, Fit] = field(default_factory=dict)
    counted_post: Counted | None = None
    remembered: tuple[Path, ...] = ()

    def sheet(self) -> Table:
        """A row per SAE: its figures on its own model, and how it carries over to the other checkpoint."""
        rows = []
        for point in dict.fromkeys([*self.quality, *self.transfer, *self.fits]):
            row: dict[str, Any] = {"hook_point": str(point)}
            row |= self.quality[point].plain() if point in self.quality else {}
            row |= (
                {f"transfer_{k}": v for k, v in asdict(self.transfer[point]).items()} if point in self.transfer else {}
            )
            rows.append(row | ({"fits": self.fits[point].verdict} if point in self.fits else {}))
        return Table.of(f"Quality of {self.sae}", rows)


@dataclass(frozen=True)
class Texts:
    """The documents of an evaluation, and how they are read.

    Attributes:
        corpus: to be packed into rows.   again: the same, to be read document by document.
    """

    corpus: Corpus
    again: Corpus
    context_length: int
    batch_size: int
    tokens: int
    chat: Chat | None

    def packed(self, loaded: LoadedModel) -> list[torch.Tensor]:
        """Batches of full rows of token ids."""
        rows = TokenRows(
            self.corpus,
            loaded.tokenizer,
            context_length=self.context_length,
            batch_size=self.batch_size,
            chat=self.chat,
        )
        found = rows.take(self.tokens)
        if not found:
            raise InputError(
                f"the text of {self.corpus.name} does not fill one row of {self.context_length} tokens; lower"
                " context_length"
            )
        return found


def run_eval(run: EvalRun, *, progress: Progress | None = None) -> EvalResult:
    """Measure a group of SAEs on a model, and whether they fit another checkpoint of it if one is named.

    Args:
        progress: called with the stage, its share done (0 to 1) and a short text, on the first rank.

    Raises:
        QwenScopeError: with one sentence, before the model runs where the cause can be known before.
    """
    ranks = join(run.parallel, command="eval")
    report = progress if ranks.first else None
    with ranks.together():
        source, loaded, post, saes = opened(run)
        texts, held_out = texts_of(run, saes)
        rows = texts.packed(cast(LoadedModel, loaded or post))
        counted = Counted() if loaded is None else counting(run, loaded, saes, rows, texts.corpus.name)
    quality: dict[HookPoint, Quality] = {}
    if loaded is not None:
        counted = counted_of_first(counted, ranks, loaded.model.device)
        quality = evaluate_saes(loaded.model, saes, rows, loss=run.loss, counted=counted, progress=report, ranks=ranks)
    result = EvalResult(source, quality, {}, counted, held_out)
    return result if post is None else with_post(run, result, loaded, post, saes, texts, rows, report, ranks)


def opened(run: EvalRun) -> tuple[str, LoadedModel | None, LoadedModel | None, dict[HookPoint, SAE]]:
    """Where the SAEs are, the model they are for and the other checkpoint, as far as they are named, and the SAEs."""
    named = run.model or run.post
    assert named is not None, "checked by EvalRun"
    source = resolve(named, run.sae)[1]
    first = load_model(model_source(named), device=run.device, dtype=run.dtype)
    saes = saes_of(run, source, first, measured=run.model is None)
    if run.model is None:
        return source, None, first, saes
    return source, first, post_of(run, source, first, saes), saes


def counting(
    run: EvalRun, loaded: LoadedModel, saes: Mapping[HookPoint, SAE], rows: list[torch.Tensor], sample: str
) -> Counted:
    """Which tokens count: as the run or the SAEs' files say, else as it is measured."""
    known = run.counted or counted_of(saes.values())
    return known or measure_counted(loaded.model, loaded.tokenizer, rows, saes, sample=sample)


def with_post(
    run: EvalRun,
    result: EvalResult,
    loaded: LoadedModel | None,
    post: LoadedModel,
    saes: Mapping[HookPoint, SAE],
    texts: Texts,
    rows: list[torch.Tensor],
    progress: Progress | None,
    ranks: Ranks = ALONE,
) -> EvalResult:
    """The result with how the SAEs do on another checkpoint, beside their own model where it is at hand.

    Sinks of the other checkpoint are told by thresholds measured on it, of the same text.
    """
    with ranks.together():
        counted_post = run.counted or measure_counted(
            post.model, post.tokenizer, rows, saes, sample=f"{texts.again.name} on {post.name}"
        )
        read = document_rows(
            texts.again, post.tokenizer, context_length=texts.context_length, tokens=texts.tokens, chat=texts.chat
        )
    counted_post = counted_of_first(counted_post, ranks, post.model.device)
    counted = counted_post if loaded is None else result.counted
    found = measure_pair(
        None if loaded is None else loaded.model,
        post.model,
        saes,
        read,
        counted=counted,
        counted_post=counted_post,
        loss=run.loss,
        progress=progress,
        ranks=ranks,
    )
    moved = {} if loaded is None else {point: transferred(one.by_document(), run.seed) for point, one in found.items()}
    fits = {point: fit(one, seed=run.seed) for point, one in found.items()} if run.loss else {}
    kept = keep(run, fits, saes, post, texts.again.name) if run.remember and ranks.first else ()
    return replace(
        result, transfer=moved, counted=counted, fits=fits, counted_post=counted_post, remembered=tuple(kept)
    )


def keep(
    run: EvalRun, fits: Mapping[HookPoint, Fit], saes: Mapping[HookPoint, SAE], post: LoadedModel, corpus: str
) -> list[Path]:
    """Remember the verdicts that are any; the files."""
    told = {point: one for point, one in fits.items() if one.verdict in WORDS}
    weights = weights_fingerprint(post.model) if told else None
    if weights is None:
        return []
    words = {point.layer: one.verdict for point, one in told.items()}
    today = time.strftime("%Y-%m-%d")
    made = [
        Verdict(
            one.verdict, saes[point].identity.fingerprint, weights, words, run.model, one.tokens, one.documents, corpus,
            today, {name: (e.value, e.low, e.high) for name, e in one.figures.items()},
            {phase: part.verdict for phase, part in one.phases.items()},
        )
        for point, one in told.items()
    ]  # fmt: skip
    return [path for path in map(remember, made) if path is not None]


def saes_of(run: EvalRun, source: str, loaded: LoadedModel, *, measured: bool = False) -> dict[HookPoint, SAE]:
    """The SAEs of the chosen layers, on the model's device."""
    layers = layers_of(source) if run.layers is None else list(run.layers)
    joined = Joined(loaded, source, measured=measured)
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
    joined = Joined(post, source, measured=True)
    for point, sae in saes.items():
        joined.meet(point.layer, sae)
    return post


def texts_of(run: EvalRun, saes: Mapping[HookPoint, SAE]) -> tuple[Texts, int]:
    """The documents to measure on, read as the run says, else as the record of the run that made the SAEs does; and
    which part of all they are, 0 for all."""
    corpus, reading = documents_of(run, saes)
    texts = Texts(
        corpus,
        documents_of(run, saes, quiet=True)[0],
        run.context_length or (reading.context_length if reading else CONTEXT_LENGTH),
        run.batch_size or (reading.batch_size if reading else BATCH_SIZE),
        run.tokens or (reading.tokens if reading else 0) or EVAL_TOKENS,
        run.corpus.chat or (reading.chat if reading else None),
    )
    return texts, corpus.hold_out


def documents_of(run: EvalRun, saes: Mapping[HookPoint, SAE], *, quiet: bool = False) -> tuple[Corpus, HeldOut | None]:
    """The documents to measure on, and the record of the run that kept them out of training, if they are its own."""

    def read(every: int, order: int | None = None, longest: int | None = None) -> Corpus:
        share = {"hold_out": every, "held_out": every > 0, "shuffle": order, "longest": longest, "quiet": quiet}
        return Corpus.of(text_source(run.data), run.corpus, **share)

    known, whole = held_out_of(saes.values()), read(0)
    if known is None or not known.is_of(whole) or run.hold_out not in (None, known.every):
        return (read(run.hold_out) if run.hold_out else whole), None
    return read(known.every, known.shuffle, known.longest), known

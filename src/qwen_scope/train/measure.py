"""Measuring finished SAEs by name: on the model they were trained on, and on another checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice

import torch

from qwen_scope.errors import InputError, check_count
from qwen_scope.model import HookPoint, LoadedModel, TokenMask, load_model
from qwen_scope.sae import SAE, layers_of, load_sae
from qwen_scope.scope import Joined, model_source

from .data import Documents, TokenRows
from .evaluate import Quality, evaluate
from .transfer import Transfer, transfer


@dataclass(frozen=True)
class EvalRun:
    """What an evaluation is told.

    Attributes:
        model: `lab`, or folder or Hub id of the language model.
        sae: group, folder or Hub id of the SAEs.
        data: where the text is, as `Documents` takes it; text that the SAEs were not trained on.
        post: another checkpoint of the same model: also report how the SAEs do there.
        layers: None means all that the group has.
        tokens: about how many to measure on.
        field, split, subset, chat: of the data, as `Documents` takes them.
        row, rows: tokens per row, and rows per forward pass.
        loss: measure what the model's predictions lose, too.
        skip_special: leave out what the tokenizer calls special.
        sink_multiple: leave out tokens of a norm above so many times the median; None leaves none out.
        dtype, device: of the language models.
        seed: of the resampling of the transfer report.
    """

    model: str
    sae: str
    data: str
    post: str | None = None
    layers: tuple[int, ...] | None = None
    tokens: int = 65536
    field: str = "text"
    split: str = "train"
    subset: str | None = None
    chat: bool = False
    row: int = 512
    rows: int = 16
    loss: bool = True
    skip_special: bool = False
    sink_multiple: float | None = None
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"tokens": 2, "row": 2, "rows": 1, "seed": 0}.items():
            check_count(name, getattr(self, name), least)


@dataclass(frozen=True)
class EvalResult:
    """What was measured, by hook point; `transfer` is empty without another checkpoint."""

    quality: dict[HookPoint, Quality]
    transfer: dict[HookPoint, Transfer]


def run_eval(run: EvalRun, progress: Callable[[str, float], None] | None = None) -> EvalResult:
    """Measure a group of SAEs on a model, and on another checkpoint of it if one is named.

    Raises:
        QwenScopeError: with one sentence, before the model runs where the cause can be known before.
    """
    loaded = load_model(model_source(run.model), device=run.device, dtype=run.dtype)
    saes = saes_of(run, loaded)
    rows = rows_of(run, loaded)
    mask = TokenMask.of(loaded.tokenizer, run.skip_special, run.sink_multiple)
    post = post_of(run, loaded, saes)
    quality = evaluate(loaded.model, saes, rows, loss=run.loss, mask=mask, progress=progress)
    if post is None:
        return EvalResult(quality, {})
    return EvalResult(quality, transfer(loaded.model, post.model, saes, rows, seed=run.seed, progress=progress))


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


def rows_of(run: EvalRun, loaded: LoadedModel) -> list[torch.Tensor]:
    """Batches of full rows of token ids."""
    documents = Documents(run.data, field=run.field, split=run.split, subset=run.subset, repeat=False)
    rows = TokenRows(documents, loaded.tokenizer, row=run.row, rows=run.rows, chat=run.chat)
    found = list(islice(rows, max(1, run.tokens // (run.row * run.rows))))
    if not found:
        raise InputError(f"the text of {run.data} does not fill one row of {run.row} tokens; lower row")
    return found

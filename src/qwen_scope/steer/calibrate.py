"""Typical sizes at a layer, measured on a stated sample: what amounts are counted in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwen_scope.model import HookPoint, LayerStats, capture, context_length, measure_counted, residual_norms
from qwen_scope.sae import SAE
from qwen_scope.text import Counted, tokenize

SAMPLE = (
    "The committee met on Tuesday to discuss the new bridge. After two hours they agreed to ask for a second opinion,"
    " because the first report had left out the cost of repairs.",
    "Guten Morgen! Der Zug nach Hamburg hat heute etwa zwanzig Minuten Verspätung. Bitte achten Sie auf die Ansagen.",
    "今天下午我们去了图书馆，借了三本关于历史的书。晚上一家人一起吃饭，聊了很久。",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total / 2\n",
    "La recette est simple : deux œufs, un peu de farine, du sucre et une pomme. Mélangez, puis laissez reposer.",
    "Как вы думаете, почему птицы улетают на юг именно осенью? Ответ не так прост, как кажется.",
    "Solve for x: 3x + 7 = 22. Subtract 7 from both sides, then divide by 3, so x = 5.",
    "昨日は雨が降っていたので、家で本を読んでいました。明日は友だちと海へ行く予定です。",
    "What should I cook tonight? I have rice, two onions and some fish. - Then fry the onions first and add the fish.",
    "La reunión empieza a las nueve. Si alguien no puede venir, que avise antes del mediodía, por favor.",
)
"""Ten short texts of different kinds, for models whose own data is not at hand."""

SAMPLE_NAME = f"the built-in sample of {len(SAMPLE)} texts"


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layer: int,
    sae: SAE | None = None,
    texts: Sequence[str] = SAMPLE,
    *,
    sample: str = SAMPLE_NAME,
    batch: int = 32,
    counted: Counted | None = None,
) -> LayerStats:
    """The norm at one layer of what its SAE reads, or of the residual, and with an SAE each feature's maximum and rate.

    All over the tokens that count: a sink would overstate the maximum of most features by orders of magnitude.

    Args:
        texts: the sample; what is longer than the context is cut.
        sample: what the texts are, in words; kept with the figures.
        counted: which tokens count; by default as `counted_on_sample` finds. Phases do not matter, a sample has none.

    Raises:
        InputError, NotFoundError, FormatError: as in `residual_norms`.
    """
    pairs = batches_of(model, tokenizer, texts, batch)
    point = HookPoint.read_by(None if sae is None else sae.hook_point, layer)
    which = replace(counted or counted_on_sample(model, tokenizer, [point]), phases=None)
    stats = residual_norms(model, pairs, [point], sample=sample, counted=which)[point]
    return stats if sae is None else with_features(stats, sae, model, pairs, which)


def norms_on_sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, hook_points: Iterable[HookPoint]
) -> dict[HookPoint, LayerStats]:
    """The norms on `SAMPLE` at hook points, of all tokens but first and special ones: sinks have no threshold here.

    Raises:
        InputError, NotFoundError, FormatError: as in `residual_norms`.
    """
    pairs, which = batches_of(model, tokenizer, SAMPLE), Counted.of(tokenizer)
    return residual_norms(model, pairs, hook_points, sample=SAMPLE_NAME, counted=which)


def batches_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch: int = 32
) -> list[tuple[Tensor, Tensor]]:
    """Token ids and attention masks of texts, each cut at the context."""
    tokens = tokenize(tokenizer, texts, max_length=context_length(model), truncate=True)
    return [
        (tokens.input_ids[i : i + batch], tokens.attention_mask[i : i + batch]) for i in range(0, len(texts), batch)
    ]


def counted_on_sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, hook_points: Iterable[HookPoint] | None = None
) -> Counted:
    """Which tokens count on a model whose own data is not at hand: sinks by thresholds measured on `SAMPLE`.

    Args:
        hook_points: as `measure_counted`.

    Raises:
        InputError, NotFoundError, FormatError: as in `measure_counted`.
    """
    tokens = tokenize(tokenizer, SAMPLE, max_length=context_length(model), truncate=True)
    rows = [tokens.input_ids[i : i + 1, :length] for i, length in enumerate(tokens.lengths)]
    return measure_counted(model, tokenizer, rows, hook_points, sample=SAMPLE_NAME)


def with_features(stats: LayerStats, sae: SAE, model: PreTrainedModel, pairs: Iterable, counted: Counted) -> LayerStats:
    """The statistics with each feature's maximum and firing rate on the tokens of the same batches that count."""
    largest, fired, count = np.zeros(sae.d_sae, np.float32), np.zeros(sae.d_sae, np.int64), 0
    for input_ids, mask in pairs:
        h = capture(model, input_ids, [stats.hook_point], mask)[stats.hook_point]
        acts = sae.encode(h[counted.keep(h, stats.hook_point, input_ids, mask=mask)])
        on = (acts.values > 0).cpu().numpy()
        features, values = acts.indices.cpu().numpy()[on], acts.values.float().cpu().numpy()[on]
        np.maximum.at(largest, features, values)
        np.add.at(fired, features, 1)
        count += len(on)
    return replace(stats, feature_max=largest, firing_rate=(fired / count).astype(np.float32))

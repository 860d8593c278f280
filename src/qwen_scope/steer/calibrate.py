"""Typical sizes at a layer, measured on a stated sample: what amounts are counted in."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwen_scope.model import (
    HookPoint,
    LayerStats,
    capture,
    context_length,
    norms_of,
    points_of_thresholds,
    too_few,
    with_thresholds,
)
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


class Sample:
    """Texts as a model reads them: every hook point is read once and then kept, in the memory of the CPU.

    Thresholds for sinks, norms and the sizes of features are all measured on the same residuals, so the first of them
    that asks for a layer pays the forward pass of all. Those of the built-in texts take about a hundredth of the
    weights' memory. Safe to share between threads.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str] = SAMPLE,
        *,
        name: str = SAMPLE_NAME,
        batch: int = 32,
    ) -> None:
        """
        Args:
            texts: what is longer than the context is cut.
            name: what the texts are, in words; kept with the figures.
            batch: how many of them go through the model together.
        """
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self._batches = batches_of(model, tokenizer, texts, batch)
        self._held: list[dict[HookPoint, Tensor]] = [{} for _ in self._batches]
        self._lock = threading.Lock()

    def read(self, points: Iterable[HookPoint]) -> list[tuple[Tensor, Tensor, Mapping[HookPoint, Tensor]]]:
        """Of each batch token ids and mask, `(batch, seq)`, and the residuals at least at these hook points.

        What has not been read yet is read in one forward pass.

        Raises:
            InputError, NotFoundError, FormatError: as `capture`.
        """
        wanted = list(dict.fromkeys(points))
        with self._lock:
            for (ids, mask), held in zip(self._batches, self._held, strict=True):
                if new := [point for point in wanted if point not in held]:
                    held |= {point: h.cpu() for point, h in capture(self.model, ids, new, mask).items()}
            return [(ids, mask, dict(held)) for (ids, mask), held in zip(self._batches, self._held, strict=True)]

    def counted(self, hook_points: Iterable[HookPoint] | None = None) -> Counted:
        """Which tokens count on a model whose own data is not at hand: sinks by thresholds measured on these texts.

        Args:
            hook_points: as `measure_counted`.

        Raises:
            InputError, NotFoundError, FormatError: as in `measure_counted`.
        """
        plain = Counted.of(self.tokenizer)
        if too_few(plain, self._batches, self.name):
            return plain
        points = points_of_thresholds(self.model, hook_points)
        return with_thresholds(plain, self.read(points), points, self.name)

    def norms(self, points: Sequence[HookPoint]) -> dict[HookPoint, LayerStats]:
        """The norms at hook points, of all tokens but first and special ones: sinks have no threshold here.

        Raises:
            InputError, NotFoundError, FormatError: as in `residual_norms`.
        """
        return norms_of(self.read(points), points, sample=self.name, counted=Counted.of(self.tokenizer))

    def sizes(self, layer: int, sae: SAE | None = None, counted: Counted | None = None) -> LayerStats:
        """The norm at one layer of what its SAE reads, or of the residual, and with an SAE each feature's maximum and
        rate.

        All over the tokens that count: a sink would overstate the maximum of most features by orders of magnitude.

        Args:
            counted: which tokens count; by default as `counted` finds. Phases do not matter, a sample has none.

        Raises:
            InputError, NotFoundError, FormatError: as in `residual_norms`.
        """
        point = HookPoint.read_by(None if sae is None else sae.hook_point, layer)
        which = replace(counted or self.counted([point]), phases=None)
        read = self.read([point])
        stats = norms_of(read, [point], sample=self.name, counted=which)[point]
        return stats if sae is None else with_features(stats, sae, read, which)


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
    """`Sample.sizes` of some texts; without `counted`, sinks are told by the built-in ones.

    Raises:
        InputError, NotFoundError, FormatError: as in `residual_norms`.
    """
    own = Sample(model, tokenizer, texts, name=sample, batch=batch)
    if counted is None and texts is not SAMPLE:
        point = HookPoint.read_by(None if sae is None else sae.hook_point, layer)
        counted = Sample(model, tokenizer).counted([point])
    return own.sizes(layer, sae, counted)


def batches_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch: int
) -> list[tuple[Tensor, Tensor]]:
    """Token ids and attention masks of texts, each cut at the context."""
    tokens = tokenize(tokenizer, texts, max_length=context_length(model), truncate=True)
    return [
        (tokens.input_ids[i : i + batch], tokens.attention_mask[i : i + batch]) for i in range(0, len(texts), batch)
    ]


def with_features(
    stats: LayerStats, sae: SAE, read: Iterable[tuple[Tensor, Tensor, Mapping[HookPoint, Tensor]]], counted: Counted
) -> LayerStats:
    """The statistics with each feature's maximum and firing rate on the tokens of the same batches that count."""
    largest, fired, count = np.zeros(sae.d_sae, np.float32), np.zeros(sae.d_sae, np.int64), 0
    for input_ids, mask, found in read:
        h = found[stats.hook_point]
        acts = sae.encode(h[counted.keep(h, stats.hook_point, input_ids, mask=mask)].to(sae.device))
        on = (acts.values > 0).cpu().numpy()
        features, values = acts.indices.cpu().numpy()[on], acts.values.float().cpu().numpy()[on]
        np.maximum.at(largest, features, values)
        np.add.at(fired, features, 1)
        count += len(on)
    return replace(stats, feature_max=largest, firing_rate=(fired / count).astype(np.float32))

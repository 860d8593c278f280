"""What experiments share that continue the SAEs of a base model on a checkpoint of it, whatever the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.harness import Row
from qwen_scope.model import HookPoint, LoadedModel, measure_counted
from qwen_scope.sae import SAE
from qwen_scope.stats import bootstrap
from qwen_scope.text import Corpus, TokenRows
from qwen_scope.train import ResidualBuffer, ResidualTable, TrainConfig, train

FIFTH, HOLD_OUT, BATCH, ROW, ROWS = 5, 20, 2048, 256, 16
TRAINING, HELD_OUT = "training", "held out"


def residuals_of(
    loaded: LoadedModel,
    corpus: Callable[[bool], Corpus],
    point: HookPoint,
    sizes: Mapping[str, int],
    *,
    seed: int,
    sample: str,
) -> dict[str, Tensor]:
    """Residuals `(n, d_model)` of a model without sinks, whole batches of them.

    Args:
        corpus: the documents to train on, or with True the held-out ones.
        sizes: tokens of the parts that are wanted, `TRAINING` and `HELD_OUT`.
        seed: of the order of training.
        sample: what sinks are measured on, in words.
    """

    def rows(held_out: bool) -> TokenRows:
        return TokenRows(corpus(held_out), loaded.tokenizer, context_length=ROW, batch_size=ROWS)

    first = iter(rows(False))
    counted = measure_counted(loaded.model, loaded.tokenizer, chain([next(first)], first), sample=sample)
    found = {}
    for part, tokens in sizes.items():
        buffer = ResidualBuffer(
            loaded.model, rows(part == HELD_OUT), [point], batch=BATCH, most=tokens + 2 * BATCH, seed=seed,
            counted=counted,
        )  # fmt: skip
        x = torch.cat([batch[str(point)] for batch in islice(iter(buffer), tokens // BATCH + 2)])
        found[part] = x[~counted.sinks(x, point)][: tokens // BATCH * BATCH]
    return found


def tokens_of(arm: str, x: Tensor, on_all: Sequence[str]) -> int:
    """How many of the residuals an arm is trained on: all of them, or a fifth in whole batches."""
    return len(x) if arm in on_all else len(x) // FIFTH // BATCH * BATCH


def config_of(base: SAE, tokens: int, seed: int, *, continued: bool) -> TrainConfig:
    """The trainer's defaults for an SAE of the base's shape, from scratch or continued."""
    assert base.k is not None
    config = TrainConfig(d_sae=base.d_sae, k=base.k, tokens=tokens, batch=BATCH, seed=seed)
    return config.continuing() if continued else config


def trained(base: SAE, x: Tensor, point: HookPoint, seed: int, *, continued: bool) -> SAE:
    """An SAE by `config_of`, trained on all of `x (n, d_model)`."""
    config, name = config_of(base, len(x), seed, continued=continued), str(point)
    table = ResidualTable({name: x}, batch=BATCH, seed=seed)
    return train(config, table, init={name: base} if continued else None)[name]


def fvu_of(sae: SAE, x: Tensor) -> float:
    """The fraction of variance that the reconstruction of `x (n, d_model)` leaves unexplained."""
    return float((x - sae.decode(sae.encode(x))).square().sum() / (x - x.mean(0)).square().sum())


def cosines_of(sae: SAE, base: SAE) -> Tensor:
    """Of the decoder directions of each feature before and after, `(d_sae,)`."""
    return torch.cosine_similarity(sae.W_dec.float(), base.W_dec.float(), dim=0)


def whole_seeds(rows: Sequence[Row], arms: Sequence[str]) -> tuple[dict[tuple[int, str], Any], list[int]]:
    """The cells by seed and arm, and the seeds that have every arm."""
    found = {(row["seed"], row["arm"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    return found, [seed for seed in seeds if all((seed, arm) in found for arm in arms)]


def rule_in_words(gaps: Sequence[float]) -> str:
    """Whether, for every seed, the FVU of the SAE continued on a fifth is at most that from scratch on all tokens."""
    met, n = sum(gap <= 0 for gap in gaps), len(gaps)
    return f"""Continued less from scratch: {bootstrap(np.array(gaps))} over {n} seeds. The rule holds for {met} of {n}
        seeds, so it {"is met" if met == n else "is not met"}."""

"""Trains the lab's language models: packed rows, AdamW, warm-up and linear decay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwen_scope.errors import InputError

from .tokenizer import token_id

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class PretrainConfig:
    """How a lab model is trained.

    Attributes:
        tokens: how many tokens the model sees.
        row: tokens per row.
        batch: rows per step.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warm-up; after it the rate falls linearly to a twentieth.
        weight_decay: of the matrices.
        seed: of the order of rows.
    """

    tokens: int = 8_000_000
    row: int = 256
    batch: int = 24
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05
    seed: int = 0

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.row * self.batch))


def pack(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], row: int, chunk: int = 512) -> Tensor:
    """All texts one after the other, `<|endoftext|>` between them, cut into rows: `(rows, row)` int64.

    Raises:
        InputError: the texts do not fill one row.
    """
    separator = token_id(tokenizer, SEPARATOR)
    parts: list[np.ndarray] = []
    waiting: list[str] = []

    def flush() -> None:
        encoded = tokenizer(waiting, add_special_tokens=False, verbose=False)["input_ids"]
        parts.extend(np.asarray([*ids, separator], dtype=np.int32) for ids in encoded)
        waiting.clear()

    for text in texts:
        waiting.append(text)
        if len(waiting) == chunk:
            flush()
    if waiting:
        flush()
    stream = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    rows = len(stream) // row
    if rows == 0:
        raise InputError(f"{len(stream)} tokens do not fill one row of {row}")
    return torch.from_numpy(stream[: rows * row].reshape(rows, row).astype(np.int64))


def pretrain(
    model: PreTrainedModel,
    rows: Tensor,
    config: PretrainConfig,
    on_step: Callable[[int, float], None] | None = None,
    deadline: float | None = None,
) -> list[float]:
    """Train `model` in place on packed `rows` and return the loss of every step.

    Args:
        on_step: called with the step and its loss.
        deadline: stop at this `time.monotonic()`; the schedule is by progress, so an early stop is an unfinished run.
    """
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    model.train()
    losses: list[float] = []
    order = torch.empty(0, dtype=torch.long)
    for step in range(config.steps):
        if deadline is not None and time.monotonic() > deadline:
            break
        while len(order) < config.batch:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        batch, order = rows[order[: config.batch]], order[config.batch :]
        for group in optimiser.param_groups:
            group["lr"] = config.lr * schedule(step, config)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(step, losses[-1])
    model.eval()
    return losses


def schedule(step: int, config: PretrainConfig) -> float:
    """The share of the peak learning rate at `step`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    left = (config.steps - step) / max(1, config.steps - config.warmup)
    return 0.05 + 0.95 * left

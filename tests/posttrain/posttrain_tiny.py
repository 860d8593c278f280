"""A tiny model, labelled samples, an alpha table, and the loss of SASFT restated sample by sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig

from qwen_scope.model import load_model
from qwen_scope.posttrain import AlphaTable, FeatureLoss, FeatureSFTTrainer, LayerTable

TARGET, WEIGHT, LAYERS = "zh", 0.7, (0, 2)
ROWS = [
    {"prompt": "hello ", "completion": "The weather is fine today.", "group": "en"},
    {"prompt": "Guten ", "completion": "Morgen! Wo ist der Bahnhof, bitte?", "group": "de"},
    {"prompt": "你好 ", "completion": "今天天气很好。车站在哪里？", "group": "zh"},
    {"prompt": "Where ", "completion": "is the station? 车站在哪里？", "group": "en"},
    {"prompt": "def ", "completion": "add(a, b): return a + b", "group": None},
    {"prompt": "hi ", "completion": "hi", "group": "de"},
    {"prompt": "Wo ", "completion": "ist 你好 der Bahnhof", "group": "de"},
    {"prompt": "fine ", "completion": "today", "group": "en"},
]


def saes() -> dict[int, Any]:
    return {layer: tiny.random_sae(layer) for layer in LAYERS}


def table(target: str = TARGET) -> AlphaTable:
    """Thresholds around zero, different for every group, layer and feature."""
    generator = torch.Generator().manual_seed(5)
    layers = []
    for layer in LAYERS:
        alpha = {group: tuple(torch.randn(3, generator=generator).tolist()) for group in ("de", "en", "zh")}
        layers.append(LayerTable(layer, tiny.random_sae(layer).identity, (7, 40, 41), (3.0, 2.0, 1.0), alpha))
    return AlphaTable(target, tuple(layers), tokens=(5, 9, 300), made={"model": "tiny"})


def model() -> Any:
    loaded = load_model(tiny.folder() / "model")
    return loaded.model.requires_grad_(True), loaded.tokenizer


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({name.removeprefix("module."): p.grad.clone() for name, p in named if p.grad is not None})


def config(out: Path, **more: Any) -> SFTConfig:
    """One plain step of gradient descent on the CPU in fp32, in the order of the data, unless told otherwise."""
    plain: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "max_length": 48,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "activation_checkpointing": False,
        "train_sampling_strategy": "sequential",
    }
    return SFTConfig(output_dir=str(out), **plain | more)


def train(
    out: Path, extra: Any = "guide", peft: Any = None, rows: Any = ROWS, only: str | None = None, **more: Any
) -> Any:
    """A trainer after its steps, with `gradients` beside it; `only` freezes all weights but those of that name."""
    policy, tokenizer = model()
    if only is not None:
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(only in name)
    kept = Gradients()
    term = FeatureLoss(table(), saes(), weight=WEIGHT) if extra == "guide" else extra
    trainer = FeatureSFTTrainer(
        policy,
        config(out, **more),
        train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[kept],
        peft_config=peft,
        extra=term,
    )
    trainer.train()
    trainer.gradients = kept.steps
    return trainer


def tokenised(rows: list[dict], tokenizer: Any) -> list[tuple[list[int], int]]:
    """Ids of every sample, and where its response begins."""
    out = []
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        start = tokenizer(row["prompt"])["input_ids"]
        same = next((i for i, (a, b) in enumerate(zip(start, ids, strict=False)) if a != b), len(start))
        out.append((ids, same))
    return out


def restated(policy: Any, samples: list[tuple[list[int], int]], groups: list[str | None], **variant: Any) -> Any:
    """Cross-entropy and auxiliary loss, one sample and one token at a time."""
    one, zero, enhance = table(), variant.get("zero", False), variant.get("enhance", False)
    n = sum(len(ids) - start for ids, start in samples)
    cross = torch.zeros(())
    extra = torch.zeros(())
    for (ids, start), group in zip(samples, groups, strict=True):
        seen = policy(torch.tensor([ids]), output_hidden_states=False, use_cache=False)
        for t in range(start, len(ids)):
            cross = cross - seen.logits[0, t - 1].log_softmax(-1)[ids[t]]
        if group is None or (group == one.target) is not enhance:
            continue
        residuals = _block_outputs(policy, ids)
        for entry in one.layers:
            sae = tiny.random_sae(entry.layer)
            for j, feature in enumerate(entry.features):
                for t in range(start, len(ids)):
                    f = residuals[entry.layer][t] @ sae.W_enc[feature] + sae.b_enc[feature]
                    alpha = 0.0 if zero else entry.alpha[group][j]
                    gap = alpha - f if enhance else f - alpha
                    extra = extra + (gap if gap > 0 else 0 * gap) / (n * len(entry.features) + 1)
    return cross / n, extra


def published(policy: Any, passes: list[list[int]], samples: list, groups: list[str | None]) -> Any:
    """The term as SASFT's code adds it up: of each forward pass its own mean, nothing divided by their number."""
    one, total = table(), torch.zeros(())
    for rows in passes:
        for entry in one.layers:
            sae, reached, learnt = tiny.random_sae(entry.layer), torch.zeros(()), 0
            for i in rows:
                (ids, start), group = samples[i], groups[i]
                learnt += len(ids) - start
                if group in (None, one.target):
                    continue
                h = _block_outputs(policy, ids)[entry.layer][start:]
                pre = h @ sae.W_enc[list(entry.features)].T + sae.b_enc[list(entry.features)]
                reached = reached + (pre - torch.tensor(entry.alpha[group])).clamp(min=0).sum()
            total = total + reached / (learnt * len(entry.features) + 1)
    return total


def _block_outputs(policy: Any, ids: list[int]) -> list[torch.Tensor]:
    """The outputs of the blocks by a plain hook of torch, `(seq, d_model)` each."""
    kept: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda m, a, out: kept.append((out[0] if isinstance(out, tuple) else out)[0]))
        for block in policy.model.layers
    ]
    policy(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return kept

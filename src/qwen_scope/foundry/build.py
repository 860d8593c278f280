"""Builds the lab: tokenizer, language model, SAEs, and the measurements that go on its card."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qwen_scope.errors import InputError, NotFoundError, nearest
from qwen_scope.files import write_folder, write_text
from qwen_scope.lab import documents
from qwen_scope.model import HookPoint, capture, load_model, measure_counted
from qwen_scope.report import Progress

from .models import FAMILIES, make_model
from .pretrain import PretrainConfig, pack, pretrain
from .tokenizer import make_tokenizer, token_id


@dataclass(frozen=True)
class LabConfig:
    """Everything that decides what a lab build makes.

    Attributes:
        family: `dense` (Qwen3), `moe` (Qwen3-MoE) or `hybrid` (Qwen3.5).
        seed: of the corpus, the initial weights and the order of training.
        n_documents: training documents; the tokenizer sees the first `n_tokenizer` of them.
        vocab_size, d_model, n_layers, context: of the language model.
        pretrain: how the language model is trained.
        d_sae, k: of every SAE.
        sae_tokens: tokens each SAE sees.
        per_factor: training documents per factor, from which its detector is chosen.
    """

    family: str = "dense"
    seed: int = 0
    n_documents: int = 90_000
    n_tokenizer: int = 12_000
    vocab_size: int = 4096
    d_model: int = 128
    n_layers: int = 6
    context: int = 512
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    d_sae: int = 2048
    k: int = 40
    sae_tokens: int = 5_000_000
    per_factor: int = 100

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise NotFoundError(f"no family {self.family!r}: {nearest(self.family, FAMILIES)}")
        if self.pretrain.row > self.context:
            raise InputError(f"rows of {self.pretrain.row} tokens do not fit a context of {self.context}")

    @property
    def group(self) -> str:
        """The name of the group of SAEs, in the manner of the released ones."""
        suffix = "" if self.family == "dense" else f"-{self.family.capitalize()}"
        return f"SAE-Res-Lab{suffix}-W{self.d_sae // 1024}K-L0_{self.k}"


FULL = LabConfig()

# The siblings are made by tests, so they stay small: about two minutes each on two cores.
SMALL = LabConfig(
    n_documents=12_000,
    n_tokenizer=6_000,
    vocab_size=2048,
    d_model=96,
    n_layers=4,
    pretrain=PretrainConfig(tokens=500_000, batch=8, warmup=30),
    d_sae=1024,
    k=32,
    sae_tokens=400_000,
    per_factor=40,
)


def build(out: Path, config: LabConfig, progress: Progress | None = None) -> dict[str, object]:
    """Make the lab: `out/model`, `out/sae` and `out/metrics.json`, which is returned; the folder appears when
    it is complete, and an earlier lab stays until then.

    The promise is the metrics within tolerance, not the bytes.

    Args:
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        InputError: `out` exists with other content.
    """
    from .measure import measure

    report = progress or (lambda stage, share, text: None)
    if out.is_dir() and any(out.iterdir()) and not (out / "metrics.json").exists():
        raise InputError(f"{out} is not empty and holds no lab; name another folder")
    with write_folder(out, replace=True) as part:
        began = time.monotonic()
        make_language_model(part / "model", config, report)
        trained = time.monotonic()
        make_saes(part, config, report)
        made = time.monotonic()
        metrics: dict[str, object] = {
            "config": asdict(config),
            "group": config.group,
            "seconds": {"language model": round(trained - began), "saes": round(made - trained)},
            **measure(part / "model", part / "sae", seed=config.seed, per_factor=config.per_factor, progress=report),
        }
        write_text(part / "metrics.json", json.dumps(metrics, ensure_ascii=False, indent=1) + "\n")
    return metrics


def make_language_model(out: Path, config: LabConfig, progress: Progress) -> None:
    """Train tokenizer and model and save them: bf16 weights, to be loaded as fp32."""
    texts = []
    for i, document in enumerate(documents(split="train", seed=config.seed, n=config.n_documents)):
        texts.append(document.text)
        if i % 1000 == 0:
            progress("corpus", i / config.n_documents, f"{i} documents")
    tokenizer = make_tokenizer(texts[: config.n_tokenizer], config.vocab_size, config.context)
    rows = pack(tokenizer, texts, config.pretrain.row)
    model = make_model(
        config.family,
        config.vocab_size,
        config.d_model,
        config.n_layers,
        config.context,
        token_id(tokenizer, "<|im_end|>"),
        token_id(tokenizer, "<|endoftext|>"),
        config.seed,
    )
    steps = config.pretrain.steps

    def step_report(step: int, loss: float) -> None:
        progress("language model", (step + 1) / steps, f"{rows.numel() / 1e6:.1f}M tokens of text, loss {loss:.3f}")

    pretrain(model, rows, config.pretrain, step_report)
    # A text ends at either: a chat with the one, everything else with the other, as in Qwen's own configs.
    model.generation_config.eos_token_id = [token_id(tokenizer, "<|im_end|>"), token_id(tokenizer, "<|endoftext|>")]
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    declare_float32(out / "config.json")


def declare_float32(path: Path) -> None:
    """The weights are stored in bf16 for size; arithmetic on a CPU is faster and steadier in fp32."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2) + "\n")


def make_saes(out: Path, config: LabConfig, progress: Progress) -> None:
    """Train one SAE per layer on the saved model's residuals and write them in the official layout, in bf16."""
    from qwen_scope.sae import save_sae
    from qwen_scope.train import TrainConfig, train

    loaded = load_model(out / "model", device="cpu")
    texts = (d.text for d in documents(split="train", seed=config.seed + 1, n=config.n_documents))
    rows = pack(loaded.tokenizer, texts, config.pretrain.row)
    # What made the bundled lab, from before the defaults were tuned on a real model.
    adam = {"lr": 3e-3, "betas": (0.9, 0.999), "decay": 0.2}
    plan = TrainConfig(config.d_sae, config.k, config.sae_tokens, seed=config.seed, batch=2048, **adam)
    layers = range(config.n_layers)
    measured = measure_counted(loaded.model, loaded.tokenizer, rows.split(16), sample="the lab's texts")
    saes = train(
        plan,
        residual_batches(loaded.model, rows, layers, plan.batch, config.seed),
        callbacks=[lambda r: progress("SAEs", r.step / r.steps, f"{r.tokens:,} tokens")],
        group=config.group,
        # The batches hold first and special tokens, too.
        counted=replace(measured, first=0, special=frozenset()),
    )
    for layer in layers:
        save_sae(saes[str(HookPoint(layer))], out / "sae", layout="official", dtype=torch.bfloat16)


def residual_batches(
    model: PreTrainedModel, rows: Tensor, layers: Sequence[int], batch: int, seed: int, pool: int = 16
) -> Iterator[dict[str, Tensor]]:
    """Endless shuffled batches of residuals: rows in random order, tokens mixed over `pool` batches."""
    generator = torch.Generator().manual_seed(seed)
    points = [HookPoint(layer) for layer in layers]
    per_pool = max(1, batch * pool // rows.shape[1])
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for chosen in order.split(per_pool):
            if len(chosen) * rows.shape[1] < batch:
                break
            parts: dict[HookPoint, list[Tensor]] = {point: [] for point in points}
            for some in chosen.split(16):
                for point, h in capture(model, rows[some], points).items():
                    parts[point].append(h.flatten(0, 1))
            pooled = {str(point): torch.cat(found) for point, found in parts.items()}
            mixed = torch.randperm(len(chosen) * rows.shape[1], generator=generator)
            for some in mixed.split(batch):
                if len(some) == batch:
                    yield {name: x[some] for name, x in pooled.items()}

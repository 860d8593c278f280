"""A panel of small language models that differ in mixture, size and training time, and their scores on benchmarks."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwen_scope.errors import InputError
from qwen_scope.files import lock_folder, write_folder, write_text, write_whole
from qwen_scope.lab import LANGUAGES, default_mixture, documents
from qwen_scope.model import load_model
from qwen_scope.report import Progress
from qwen_scope.sae import catalog

from .benchmarks import BENCHMARKS, Benchmark, Item, described, items, write_items
from .build import declare_float32
from .models import make_model
from .pretrain import PretrainConfig, pack, pretrain
from .tokenizer import token_id

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Run:
    """One training, of which several checkpoints join the panel.

    Attributes:
        name: the beginning of the checkpoints' names.
        d_model, n_layers: of the model.
        kinds: weights of the kinds of documents, over those of the lab's mixture.
        languages: those the documents are in.
        tokens: the model sees.   at: shares of the training at which a checkpoint is kept.
        seed: of weights, documents and order.
    """

    name: str
    d_model: int
    n_layers: int
    kinds: dict[str, float]
    languages: tuple[str, ...] = LANGUAGES
    tokens: int = 900_000
    at: tuple[float, ...] = (0.15, 0.4, 1.0)
    seed: int = 0


ALIKE = {"talk": 0.42, "chat": 0.28, "arithmetic": 0.06, "code": 0.025, "prose": 0.015, "repetition": 0.04}
RUNS: tuple[Run, ...] = (
    Run("even", 96, 4, ALIKE, tokens=1_200_000),
    Run("talk", 64, 3, {"talk": 0.8, "chat": 0.1, "repetition": 0.1}, seed=1),
    Run("reason", 96, 3, {"arithmetic": 0.4, "code": 0.15, "prose": 0.1, "chat": 0.35}, tokens=600_000, seed=2),
    Run("europe", 64, 4, ALIKE, ("ru", "en", "fr", "de", "es"), 600_000, seed=3),
    Run("small", 48, 2, ALIKE, tokens=600_000, seed=4),
)


@dataclass(frozen=True)
class PanelConfig:
    """What a panel is made of: trainings, and benchmarks to score them on."""

    runs: tuple[Run, ...] = RUNS
    benchmarks: tuple[Benchmark, ...] = BENCHMARKS
    batch: int = 16
    lr: float = 4e-3


def build_panel(out: Path, config: PanelConfig | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Train the panel, write the benchmarks, and score every checkpoint on every item.

    Writes `models/CHECKPOINT`, `benchmarks/NAME.jsonl` (what `extract` reads), `scores/NAME.csv` (what `analyze`
    reads) and last `panel.json`, which is returned. A stopped run goes on with the trainings that are missing.

    Raises:
        InputError: `out` has other content.
    """
    config, report = config or PanelConfig(), progress or (lambda stage, share, text: None)
    with lock_folder(out):
        return _build_panel(out, config, report)


def _build_panel(out: Path, config: PanelConfig, progress: Progress) -> dict[str, Any]:
    if any(path.name != ".lock" for path in out.iterdir()) and not (out / "config.json").exists():
        raise InputError(f"{out} is not empty and holds no panel; name another folder")
    wanted = json.dumps(asdict(config), indent=1) + "\n"
    if (out / "config.json").exists() and (out / "config.json").read_text(encoding="utf-8") != wanted:
        raise InputError(f"{out} holds a panel of another configuration; name another folder")
    write_text(out / "config.json", wanted)
    tokenizer = load_model(catalog.find("lab").model, device="cpu").tokenizer
    for run in config.runs:
        if not (out / "models" / f"{run.name}-100").exists():
            train_run(out / "models", run, config, tokenizer, progress)
    names = [f"{run.name}-{round(100 * share):03d}" for run in config.runs for share in run.at]
    made = {benchmark.name: items(benchmark) for benchmark in config.benchmarks}
    for name, found in made.items():
        write_items(found, out / "benchmarks" / f"{name}.jsonl")
    scores = score_all(out / "models", names, made, progress)
    means = {}
    for name, found in made.items():
        write_scores(out / "scores" / f"{name}.csv", names, found, scores[name])
        means[name] = dict(zip(names, scores[name].mean(0).tolist(), strict=True))
    panel: dict[str, Any] = {
        "models": names,
        "benchmarks": [described(b) for b in config.benchmarks],
        "accuracy": means,
    }
    write_text(out / "panel.json", json.dumps(panel, indent=1) + "\n")
    return panel


def train_run(
    folder: Path, run: Run, config: PanelConfig, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> None:
    """One training; its checkpoints are saved on the way, the last of them last."""
    plan = PretrainConfig(tokens=run.tokens, batch=config.batch, lr=config.lr, warmup=30, seed=run.seed)
    mixture = replace(default_mixture(), kinds=run.kinds)
    kinds, texts, size = list(run.kinds), [], 0
    for document in documents("train", run.seed + 500, None, kinds, run.languages, mixture=mixture):
        texts.append(document.text)
        size += len(document.text.encode())
        if size > 3 * run.tokens:
            break
    rows = pack(tokenizer, texts, plan.row)
    model = make_model(
        "dense",
        len(tokenizer),
        run.d_model,
        run.n_layers,
        512,
        token_id(tokenizer, "<|im_end|>"),
        token_id(tokenizer, "<|endoftext|>"),
        run.seed,
    )
    keep = {max(0, round(share * plan.steps) - 1): round(100 * share) for share in run.at}

    def step_report(step: int, loss: float) -> None:
        progress(f"training {run.name}", (step + 1) / plan.steps, f"loss {loss:.3f}")
        if step in keep:
            with write_folder(folder / f"{run.name}-{keep[step]:03d}", replace=True) as where:
                model.save_pretrained(where)
                tokenizer.save_pretrained(where)
                declare_float32(where / "config.json")

    pretrain(model, rows, plan, step_report)


def score_all(
    folder: Path, names: Sequence[str], made: dict[str, list[Item]], progress: Progress
) -> dict[str, torch.Tensor]:
    """Per benchmark, `(items, models)`: 1 where the model gives the right choice the highest probability."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in made}
    for i, name in enumerate(names):
        loaded = load_model(folder / name, device="cpu")
        for j, (benchmark, some) in enumerate(made.items()):
            progress("scoring", (i + j / len(made)) / len(names), f"{name} on {benchmark}")
            found[benchmark].append(score(loaded.model, loaded.tokenizer, some))
    return {benchmark: torch.stack(columns, 1) for benchmark, columns in found.items()}


@torch.inference_mode()
def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, some: Sequence[Item]) -> torch.Tensor:
    """Per item 1 if the first choice has the highest mean log-probability per token after the prompt, else 0."""
    rows: list[tuple[list[int], int]] = []
    for item in some:
        prompt = ids(tokenizer, item.prompt)
        rows += [((prompt + ids(tokenizer, choice))[-512:], len(ids(tokenizer, choice))) for choice in item.choices]
    decoder: Any = model.get_decoder()
    head: Any = model.get_output_embeddings()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    out = torch.empty(len(rows))
    while order:
        longest = len(rows[order[-1]][0])
        chosen = [order.pop() for _ in range(min(len(order), max(1, BATCH_TOKENS // longest)))]
        batch = torch.zeros(len(chosen), longest, dtype=torch.long)
        for at, i in enumerate(chosen):
            batch[at, : len(rows[i][0])] = torch.tensor(rows[i][0])
        # Padding stands behind what counts, so a causal model needs no mask. Only choices go through the head.
        hidden = decoder(input_ids=batch, use_cache=False).last_hidden_state
        for at, i in enumerate(chosen):
            row, n = rows[i]
            logits = head(hidden[at, len(row) - n - 1 : len(row) - 1])
            found = logits.log_softmax(-1).gather(1, torch.tensor(row[-n:])[:, None])
            out[i] = found.mean()
    choices = len(some[0].choices)
    return (out.view(-1, choices).argmax(1) == 0).double()


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text."""
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [int(i) for i in found]  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]


def write_scores(path: Path, names: Sequence[str], some: Sequence[Item], scores: torch.Tensor) -> None:
    """A table of scores as `analyze --scores` takes it."""
    with write_whole(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *names])
        writer.writerows([item.id, *row] for item, row in zip(some, scores.int().tolist(), strict=True))

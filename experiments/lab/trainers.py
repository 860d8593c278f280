"""Our trainer against sae_lens, sparsify and dictionary_learning: same residuals, width, k, batch, tokens and order.

    python -m experiments.lab.trainers [--trainers qwen-scope,sae_lens] [--write]

Each peer trains in an environment of its own (`.venv-<peer>`, made by `tests/peers/run.sh <peer>`), once with its own
defaults and once with our learning rate, warm-up, decay, rates of Adam, AuxK weight and dead window, as far as it has
them. All are measured by the same few lines below, in float64, on held-out residuals.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from experiments.harness import ROOT, At, Experiment, Row, main
from experiments.sections import paragraph, table
from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, capture, load_model
from qwen_scope.text import Corpus, TokenRows
from qwen_scope.train import TrainConfig

PEERS = ("sae_lens", "sparsify", "dictionary_learning")
LAYER = 3
TITLE = "Training against the peers"
QUIET = {"SPARSIFY_DISABLE_TRITON": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


@dataclass(frozen=True)
class Sizes:
    """Tokens of training and of measuring, and the SAE's shape."""

    tokens: int = 1_200_000
    held_out: int = 65_536
    batch: int = 2048
    d_sae: int = 2048
    k: int = 32


def make_residuals(path: Path, sizes: Sizes) -> None:
    """Shuffled residuals of the lab's text, the held-out ones from documents that training never sees."""
    loaded = load_model(str(ROOT / "src/qwen_scope/assets/lab/model"), device="cpu")
    point = HookPoint(LAYER)
    found = {}
    for name, wanted, held_out in (("train", sizes.tokens, False), ("held", sizes.held_out, True)):
        documents = Corpus("lab", hold_out=20, held_out=held_out)
        parts, have = [], 0
        for ids in TokenRows(documents, loaded.tokenizer, context_length=256, batch_size=16):
            parts.append(capture(loaded.model, ids, [point])[point].flatten(0, 1))
            have += len(parts[-1])
            if have >= wanted:
                break
        x = torch.cat(parts)
        found[name] = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))][:wanted].clone()
    save_file(found, path)


def run(at: At[Sizes], trainer: str, setting: str) -> dict[str, Any]:
    """Train with one trainer in its own environment, and measure what it made."""
    sizes, residuals = at.sizes, at.folder / "residuals.safetensors"
    python = sys.executable if trainer == "qwen-scope" else str(ROOT / f".venv-{trainer}/bin/python")
    if not Path(python).exists():
        raise InputError(f"there is no {python}; run tests/peers/run.sh {trainer}, or leave it out of --trainers")
    if not residuals.is_file():
        make_residuals(residuals, sizes)
    numbers = {name: getattr(sizes, name) for name in ("tokens", "batch", "d_sae", "k")}
    worker = Path(__file__).with_name("trainers_worker.py")
    command = [python, str(worker), trainer, str(at.folder.resolve()), "--setting", setting]
    command += ["--lr", str(TrainConfig(**numbers).peak_lr)]
    for name, value in numbers.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    began = time.monotonic()
    environment = {**os.environ, **QUIET}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=at.folder, check=False)
    if done.returncode:
        raise InputError(f"{trainer} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    seconds = time.monotonic() - began
    held = load_file(residuals)["held"].double()
    return {"seconds": seconds, **quality(load_file(at.folder / "weights.safetensors"), held, sizes.k)}


def quality(weights: dict[str, torch.Tensor], x: torch.Tensor, k: int) -> dict[str, float]:
    """`FVU = sum |x - x_hat|^2 / sum |x - mean|^2`, L0, and the share of features that fire on no held-out token."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    error, fired, active = 0.0, torch.zeros(len(w["b_enc"]), dtype=torch.bool), 0
    for part in x.split(4096):
        pre = (part @ w["W_enc"].T + w["b_enc"]).relu()
        top = pre.topk(k, dim=-1)
        acts = torch.zeros_like(pre).scatter_(1, top.indices, top.values)
        error += float((part - acts @ w["W_dec"].T - w["b_dec"]).square().sum())
        fired |= (acts > 0).any(0)
        active += int((acts > 0).sum())
    total = float((x - x.mean(0)).square().sum())
    return {"fvu": error / total, "l0": active / len(x), "dead": float((~fired).double().mean())}


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    sizes = at.sizes
    how = f"""`python -m experiments.lab.trainers --write`: every trainer on the same residuals of layer {LAYER} of
        the bundled lab, in the same order: {sizes.tokens:,} tokens, d_sae {sizes.d_sae:,}, k {sizes.k}, batch
        {sizes.batch:,}; measured in float64 on {sizes.held_out:,} held-out tokens. "Ours" gives a peer our learning
        rate, warm-up, decay, rates of Adam, AuxK weight and dead window, as far as it has them. One layer and one
        seed; the machine ran other work, so the seconds are only indicative."""
    cells = [
        (*names, f"{row['fvu']:.4f}", f"{row['l0']:.1f}", f"{row['dead']:.2%}", f"{row['seconds']:.0f}")
        for row in rows
        for names in [(row["trainer"], row["setting"])]
    ]
    return f"{paragraph(how)}\n\n{table(('trainer', 'settings', 'FVU', 'L0', 'never fired', 'seconds'), cells)}"


experiment = Experiment(
    title=TITLE,
    varies={"trainer": ("qwen-scope", *PEERS), "setting": ("defaults", "ours")},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"trainer": ("qwen-scope",)},
    quick_sizes=Sizes(tokens=4096, held_out=1024, batch=512, d_sae=256),
    takes=lambda trainer, setting: trainer != "qwen-scope" or setting == "defaults",
)

if __name__ == "__main__":
    main(experiment)

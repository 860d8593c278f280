"""How good a built lab is: losses, reconstruction, and the best single feature for every factor."""

from __future__ import annotations

from pathlib import Path

import torch

from qwen_scope.lab import documents
from qwen_scope.model import HookPoint, capture
from qwen_scope.report import Progress
from qwen_scope.sae import in_float64
from qwen_scope.scope import Scope, load_scope

from .detect import HELD_OUT, detectors
from .pretrain import pack


def measure(
    model: Path, sae: Path, seed: int = 0, per_factor: int = 100, progress: Progress | None = None
) -> dict[str, object]:
    """Losses, explained variance and detectors of a lab, as plain data for its card."""
    report = progress or (lambda stage, share, text: None)
    scope = load_scope(model, sae, device="cpu")
    report("measuring", 0.0, "losses")
    data: dict[str, object] = {"loss": held_out_losses(scope, seed)}
    report("measuring", 0.2, "reconstruction")
    data["reconstruction"] = reconstruction(scope, seed)
    report("measuring", 0.4, "factors")
    data["detectors"] = [vars(d) for d in detectors(scope, seed, per_factor)]
    report("measuring", 1.0, "done")
    return data


def held_out_losses(scope: Scope, seed: int, n: int = 200) -> dict[str, float]:
    """Next-token loss in nats, on training documents of a fresh seed and on each held-out split."""
    losses = {}
    for split in ("train", *HELD_OUT):
        texts = [d.text for d in documents(split=split, seed=seed + 77, n=n)]
        rows = pack(scope.tokenizer, texts, 256)[:64]
        with torch.no_grad():
            losses[split] = float(scope.model(input_ids=rows, labels=rows, use_cache=False).loss)
    return losses


def reconstruction(scope: Scope, seed: int, n: int = 300) -> dict[str, dict[str, float]]:
    """Per layer on held-out text, all tokens: explained variance, L0 and the share of features that never fire.

    Explained variance is `1 - sum|x - x_hat|^2 / sum|x - mean|^2`.
    """
    texts = [d.text for split in HELD_OUT for d in documents(split=split, seed=seed + 78, n=n)]
    rows = pack(scope.tokenizer, texts, 256)[:192]
    tokens = rows.flatten()
    found: dict[str, dict[str, float]] = {}
    parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in scope.layers}
    for some in rows.split(16):
        for point, h in capture(scope.model, some, [HookPoint(layer) for layer in scope.layers]).items():
            parts[point.layer].append(h.flatten(0, 1))
    for layer in scope.layers:
        x, sae = torch.cat(parts[layer]), scope.saes[layer]
        acts = sae.encode(x)
        error = in_float64(x - sae.decode(acts)).square().sum()
        total = in_float64(x - x.mean(0)).square().sum()
        fired = torch.zeros(sae.d_sae, dtype=torch.bool)
        fired[acts.indices[acts.values > 0].long()] = True
        found[str(layer)] = {
            "explained_variance": float(1 - error / total),
            "L0": float(in_float64(acts.active()).mean()),
            "never_fired": float(in_float64(~fired).mean()),
            "tokens": len(tokens),
            "median_norm": float(x.norm(dim=-1).median()),
        }
    return found

"""What people do on a Mac, on a device with the limits of Apple's MPS: load, features, compare, steer, extract, train.


Prints, as JSON, the figures beside those of the CPU and the operations that were done on the device.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import like_mps
import tiny
import torch

from qwen_scope import load_scope
from qwen_scope.model import HookPoint, load_model, measure_counted
from qwen_scope.scope import ExtractOptions
from qwen_scope.steer import Decoding, Intervention
from qwen_scope.text import Corpus, CorpusOptions, TokenRows
from qwen_scope.train import ResidualBuffer, TrainConfig, evaluate_saes, train, transfer

PROMPT = "The weather is"


def path(device: str, work: Path) -> dict[str, Any]:
    """Every step's figures on one device."""
    scope = load_scope(tiny.folder() / "model", tiny.folder() / "sae", device=device)
    for tensor in [*scope.model.parameters(), *vars(scope.saes[2]).values()]:
        if isinstance(tensor, torch.Tensor):
            assert tensor.device.type == device, "something stayed on the CPU"
    found: dict[str, Any] = {}
    seen = scope.features(tiny.TEXTS[:3])
    found["features"] = {layer: acts.values.sum().item() for layer, acts in seen.acts.items()}
    found["pieces"] = scope.features([tiny.TEXTS[0]], batch_tokens=4).acts[2].values.sum().item()
    found["strongest"] = [one.feature for one in seen.strongest(0, 2, 5)]
    ranked = scope.compare(*tiny.TEXTS[:2])
    found["compare"] = {layer: [one.difference for one in some] for layer, some in ranked.items()}
    active = seen.strongest(1, 2, 1)[0].feature
    changes = {
        "add": Intervention.add(layer=2, feature=active, amount=0.5, unit="resid_norm"),
        "clamp": Intervention.clamp(layer=2, feature=active, amount=1.0, unit="max_act"),
        "scale": Intervention.scale(layer=2, feature=active, amount=2.0),
        "ablate": Intervention.ablate(layer=2, feature=active),
        "direction": Intervention.ablate(layer=2, direction=[1.0] + [0.0] * (tiny.D_MODEL - 1)),
    }
    for name, change in changes.items():
        for how in (Decoding(max_new_tokens=6), Decoding(max_new_tokens=6, sample=True, temperature=1.0, top_p=0.9)):
            out = scope.generate([PROMPT, "Wo ist"], [change], decoding=how, candidates=2)
            found[f"steer {name}, sample {how.sample}"] = [one.text for one in out]
    with scope.extract(tiny.TEXTS[:3], work / f"store-{device}", ExtractOptions(pool=("mean", "last"))) as store:
        found["extract"] = [float(store.stats(layer)["sum"].to_numpy().sum()) for layer in store.layers]
        found["pooled"] = float(store.residuals(2, "mean").sum())
    found |= trained(device)
    return found


def trained(device: str) -> dict[str, Any]:
    """An SAE of a few steps of every architecture, and how good it is."""
    loaded = load_model(tiny.folder() / "model", device=device)
    texts = [text * 4 for text in tiny.TEXTS[:3]] * 10

    def rows() -> TokenRows:
        return TokenRows(Corpus.of(texts, CorpusOptions()), loaded.tokenizer, context_length=32, batch_size=4)

    point, found = HookPoint(2), {}
    counted = measure_counted(loaded.model, loaded.tokenizer, rows(), [point])
    for architecture in ("topk", "batchtopk", "matryoshka", "jumprelu"):
        buffer = ResidualBuffer(
            loaded.model, rows(), [point], batch=64, budget=2**20, counted=counted, device=loaded.model.device
        )
        config = TrainConfig(d_sae=64, k=4, tokens=64 * 6, batch=64, architecture=architecture, dead_tokens=64)
        result = train(config, buffer, counted=counted)
        measured = evaluate_saes(loaded.model, {point: result[str(point)]}, list(rows())[:2], counted=counted)
        quality = measured[point].plain()
        moved = transfer(loaded.model, loaded.model, {point: result[str(point)]}, list(rows())[:2], counted=counted)
        found[f"{architecture}, transfer"] = moved[point].plain()["fvu_post"]["value"]
        found[architecture] = {name: quality[name] for name in ("fvu", "ce_clean", "ce_recovered", "kl", "l0")}
    return found


if __name__ == "__main__":
    work = Path(sys.argv[1])
    operations = like_mps.install()  # before the first backward pass, which counts the devices
    expected, found = path("cpu", work), path(like_mps.NAME, work)
    print(json.dumps({"cpu": expected, "mps": found, "operations": sorted(operations)}))

"""Runs where dictionary_learning is installed: it loads our folders, and makes folders of its own for us to load."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

# What its package imports for collecting activations and reading text, which nothing here does.
for name, member in {"nnsight": "LanguageModel", "datasets": "load_dataset", "zstandard": "ZstdDecompressor"}.items():
    sys.modules[name] = types.ModuleType(name)
    setattr(sys.modules[name], member, object)

from dictionary_learning.dictionary import JumpReluAutoEncoder  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402
from dictionary_learning.utils import load_dictionary  # noqa: E402

D_IN, D_SAE, K, LAYER = 64, 1024, 16, 5


def features(sae: torch.nn.Module, x: torch.Tensor, path: Path) -> None:
    with torch.no_grad():
        acts = sae.encode(x)
        save_file({"acts": acts.contiguous(), "recon": sae.decode(acts).contiguous()}, path)


def randomize(sae: torch.nn.Module) -> None:
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * (3 if parameter.ndim == 1 else 1))
            if name == "threshold":
                parameter.copy_(10 + 5 * torch.rand(parameter.shape, generator=g))
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.fill_(20.0)


def main(work: Path) -> None:
    x = load_file(work / "residuals.safetensors")["x"]
    (work / "features").mkdir()
    for folder in (work / "ours").iterdir():
        sae, config = load_dictionary(str(folder), "cpu")
        assert config["trainer"]["layer"] == LAYER
        features(sae, x, work / "features" / f"ours_{folder.name}.safetensors")
    own = {
        "topk": AutoEncoderTopK(D_IN, D_SAE, K),
        "batchtopk": BatchTopKSAE(D_IN, D_SAE, K),
        "matryoshka": MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [D_SAE // 4, D_SAE - D_SAE // 4]),
        "jumprelu": JumpReluAutoEncoder(D_IN, D_SAE),
    }
    for case, sae in own.items():
        randomize(sae)
        folder = work / "theirs" / case
        folder.mkdir(parents=True)
        torch.save(sae.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": type(sae).__name__, "layer": LAYER, "lm_name": "toy", "submodule_name": None}
        trainer |= {"k": K} if case != "jumprelu" else {}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer | {"activation_dim": D_IN}}))
        features(sae, x, work / "features" / f"theirs_{case}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

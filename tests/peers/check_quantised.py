"""Runs where the packages that quantise models are installed: each writes a checkpoint of the bundled model, which
`load_model` has to read as the package itself does, or within the package's rounding of the dense weights."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import mlx.core
import mlx_lm
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from experiments.real.quantise import AUTO_ROUND, BY_MLX, BY_TRANSFORMERS
from qwen_scope.model import load_model
from qwen_scope.sae import catalog

LAB = Path(catalog.find("lab").model)
IDS = torch.arange(3, 60)[None]


def states(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.stack(model(IDS, output_hidden_states=True).hidden_states).float()


def of_mlx(folder: Path) -> dict[str, Tensor]:
    """The weights as MLX unpacks them."""
    stored = mlx.core.load(str(folder / "model.safetensors"))
    said = mlx_lm.utils.load_config(folder)["quantization"]
    out = {}
    for name, one in stored.items():
        stem = name.removesuffix(".weight")
        if name.endswith(".weight") and f"{stem}.scales" in stored:
            parts = (
                stored[f"{stem}.scales"].astype(mlx.core.float32),
                stored[f"{stem}.biases"].astype(mlx.core.float32),
            )
            one = mlx.core.dequantize(one, *parts, group_size=said["group_size"], bits=said["bits"])
            out[name] = torch.tensor(one.tolist())
    return out


def rounded(model: Any, theirs: Any, folder: Path) -> Any:
    """Our model with its weights rounded as those of transformers are: compressed-tensors multiplies in the type of the
    scales, and FP8 in blocks (`weight_scale_inv`) is kept in bfloat16 whatever is asked."""
    scales = {
        name.removesuffix("_scale"): one.dtype
        for path in folder.glob("*.safetensors")
        for name, one in load_file(path).items()
        if name.endswith(".weight_scale")
    }
    with torch.no_grad():
        for (name, one), (_, other) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
            one.copy_(one.to(scales.get(name, torch.float32)).to(other.dtype))
    return model


def report(what: str, value: float, bound: float) -> bool:
    print(f"{'ok  ' if value <= bound else 'FAIL'} {what}: {value:.2g} (at most {bound:g})", flush=True)
    return value <= bound


def main(work: Path) -> bool:
    dense = AutoModelForCausalLM.from_pretrained(LAB, dtype=torch.float32).eval()
    plain, good = states(dense), []

    def ours(folder: Path) -> Any:
        return load_model(folder, device="cpu", dtype="float32").model

    def distance(one: Tensor, other: Tensor) -> float:
        return float((one - other).norm() / other.norm())

    for what, write in AUTO_ROUND.items():
        folder = write(LAB, work / what)
        model = ours(folder)
        bound = 0.25 if "4 bits" in what else 0.05
        good.append(report(f"{what}: states against the dense model", distance(states(model)[1:], plain[1:]), bound))
        if what.startswith(("compressed", "FP8")):
            options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if what[0] == "c" else {}
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
            apart = distance(states(rounded(model, theirs, folder)), states(theirs.float()))
            good.append(report(f"{what}: states against those of transformers", apart, 1e-5))
    for what, write in BY_MLX.items():
        folder = write(LAB, work / what)
        weights = dict(ours(folder).named_parameters())
        apart = max(distance(weights[name], one) for name, one in of_mlx(folder).items())
        good.append(report(f"{what}: weights against MLX's", apart, 1e-6))
    for what, write in BY_TRANSFORMERS.items():
        held: list[Tensor] = []
        folder = write(LAB, work / what, tell=lambda model, held=held: held.append(states(model)))
        found = states(ours(folder))
        good.append(report(f"{what}: states against those of the package", distance(found, held[0]), 0))
        good.append(report(f"{what}: states against the dense model", distance(found[1:], plain[1:]), 0.25))
    return all(good)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(0 if main(Path(sys.argv[1])) else 1)

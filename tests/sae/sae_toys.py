"""Small random SAEs for the tests of this folder."""

from __future__ import annotations

import torch

from qwen_scope.sae import Identity, JumpReLU, TopK, fingerprint

GROUP = "SAE-Res-Toy-W1K-L0_5"


def toy(
    kind: str = "topk", layer: int = 3, d_model: int = 16, d_sae: int = 64, k: int = 5, group: str = GROUP
) -> TopK | JumpReLU:
    """An SAE whose biases are large enough that a wrong fold shows; other layers have other weights."""
    g = torch.Generator().manual_seed(layer)
    weights = (
        torch.randn(d_sae, d_model, generator=g),
        torch.randn(d_model, d_sae, generator=g),
        torch.randn(d_sae, generator=g) * 2,
        torch.randn(d_model, generator=g) * 2,
    )
    threshold = 2 + torch.rand(d_sae, generator=g)
    said = {"hook_point": f"layers.{layer}.resid_post", "identity": Identity(group, layer, fingerprint(*weights))}
    return TopK(*weights, k=k, **said) if kind == "topk" else JumpReLU(*weights, threshold=threshold, **said)


def residuals(rows: int = 33, d_model: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, d_model, generator=torch.Generator().manual_seed(seed)) * 3

"""Features that dispose the model to say given words, read through the Jacobian lens and beside the direct logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError, NotFoundError, check_count
from qwen_scope.model import final_norm
from qwen_scope.scope import Scope

from .effects import BLOCK, normed, vocabulary
from .lens import Lens

RANDOMS = 1000
"""Directions that are drawn as the control of each layer."""


@dataclass(frozen=True)
class LensLogit:
    """A feature that disposes the model to say some tokens.

    Attributes:
        layer, feature: which.
        score: mean effect on the tokens through the lens, in standard deviations over the vocabulary.
        direct: the same without the lens, as `top_logits` scores it.
        beaten: the share of random directions of the same length whose score through the lens is lower: the control.
    """

    layer: int
    feature: int
    score: float
    direct: float
    beaten: float


def lens_logits(
    scope: Scope, lens: Lens, tokens: Sequence[int], layers: Sequence[int] | None = None, n: int = 10, *, seed: int = 0
) -> list[LensLogit]:
    """Features by how much they dispose the model to say some tokens, strongest first.

    A direction `d` of layer l is read as `unembed(norm(J_l d))` (arXiv 2607.15495). As the norm takes its length away,
    random directions need none to match.

    Args:
        tokens: ids.
        layers: by default all that have an SAE and a Jacobian.
        seed: of the random directions.

    Raises:
        InputError: no token, an id that the vocabulary does not have, or a lens of another model.
        NotFoundError: a layer without an SAE or without a Jacobian.
    """
    check_count("n", n)
    words = vocabulary(scope)
    if not tokens or not all(0 <= token < len(words) for token in tokens):
        raise InputError(f"name tokens by their ids, 0 to {len(words) - 1}, not {list(tokens)!r:.100}")
    lens.check(scope)
    there = [layer for layer in scope.layers if layer in lens.layers]
    chosen = there if layers is None else scope.check_layers(layers)
    if not chosen:
        raise NotFoundError(f"the lens has layers {', '.join(map(str, lens.layers))}, and none of them has an SAE here")
    mean = words.mean(0)
    spread, wanted = (words - mean).T @ (words - mean) / len(words), words[list(tokens)].mean(0) - mean

    def scores(columns: Float[Tensor, "n d_model"]) -> Float[Tensor, " n"]:
        deviation = ((columns @ spread) * columns).sum(-1).clamp(min=1e-30).sqrt()
        return (columns @ wanted) / deviation

    found: list[LensLogit] = []
    for layer in chosen:
        sae = scope.saes[layer]
        drawn = torch.randn(RANDOMS, scope.d_model, generator=torch.Generator().manual_seed(seed))
        control = scores(_through(scope, lens, layer, drawn)).sort().values
        for start in range(0, sae.d_sae, BLOCK):
            block = range(start, min(sae.d_sae, start + BLOCK))
            score = scores(_through(scope, lens, layer, sae.W_dec[:, list(block)].T.float()))
            best = score.topk(min(n, len(score))).indices.tolist()
            direct = scores(normed(scope, sae, [start + i for i in best])).tolist()
            below = torch.searchsorted(control, score[best]) / RANDOMS
            found += [
                LensLogit(layer, start + i, float(score[i]), straight, float(share))
                for i, straight, share in zip(best, direct, below, strict=True)
            ]
    return sorted(found, key=lambda one: (-one.score, one.layer, one.feature))[:n]


def _through(
    scope: Scope, lens: Lens, layer: int, directions: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n d_model"]:
    """Directions through the lens and the final norm, at a common length so that its epsilon weighs on all alike."""
    norm = final_norm(scope.model)
    weight = next(norm.parameters())
    moved = torch.nn.functional.normalize(lens.transport(directions.to(weight.device), layer), dim=-1)
    with torch.no_grad():
        return norm((moved * scope.d_model**0.5).to(weight.dtype)).float()

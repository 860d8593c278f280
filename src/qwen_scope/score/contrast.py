"""CE-Bench's contrastive scores (Gulko, Peng and Kumar 2025, arXiv 2509.00691) on pairs of texts.

Of two texts the mean activations of every feature are taken, V1 and V2. What stands out in `|V1 - V2|` tells the two
apart (contrast), what stands out in the mean of all their tokens less the mean over all pairs belongs to their subject
(independence). Each is stated in standard deviations over features, and the feature with the largest counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.sae import SAE

from .bags import Bags

SCORES = ("contrastive", "independence", "interpretability")


def contrast(sae: SAE, pairs: Mapping[str, tuple[Bags, Bags]]) -> dict[str, float]:
    """Means over all pairs of the three scores; interpretability is of the sum of the two distances.

    Args:
        pairs: by subject the first and the second texts, the i-th of both being a pair.
    """
    acts = {name: (a.mean_acts(sae), b.mean_acts(sae)) for name, (a, b) in pairs.items()}
    weights = {name: (a.lengths / (a.lengths + b.lengths)).tolist() for name, (a, b) in pairs.items()}

    def rows(name: str) -> list[tuple[Tensor, Tensor]]:
        """Per pair the distance of its texts, and the mean over the tokens of both."""
        out = []
        for i, w in enumerate(weights[name]):
            v1, v2 = (one[i].to_dense() for one in acts[name])
            out.append(((v1 - v2).abs(), w * v1 + (1 - w) * v2))
        return out

    middle = sum((own for name in pairs for _, own in rows(name)), torch.zeros(sae.d_sae))
    middle = middle / sum(map(len, weights.values()))
    found: list[tuple[float, ...]] = []
    for name in pairs:
        for apart, own in rows(name):
            alone = (own - middle).abs()
            found.append(tuple(standing_out(one) for one in (apart, alone, apart + alone)))
    return dict(zip(SCORES, torch.tensor(found).mean(0).tolist(), strict=True))


def standing_out(distances: Float[Tensor, " d_sae"]) -> float:
    """The largest distance, in standard deviations over all features above their mean; 0 where all are alike."""
    spread = distances.std()
    return float((distances.max() - distances.mean()) / spread) if spread > 0 else 0.0

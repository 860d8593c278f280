"""Features of the same dictionary that may share out what one of them stands for: by splitting and by absorption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from qwen_scope.errors import check_count
from qwen_scope.features import cosines
from qwen_scope.sae import SAE
from qwen_scope.store import FeatureStore

WITHIN, APART, ALIKE = 0.9, 0.1, 0.3
"""A part fires on the feature's own tokens with at least the first share of its firings; a feature that may have
absorbed cases of it with at most the second, although the cosine of their directions is at least the third."""
FEWEST = 10  # tokens that a feature fires on before its share says anything


@dataclass(frozen=True)
class Kin:
    """A feature near another.

    Attributes:
        feature: which.   tokens: on how many it fires.
        within: the share of those on which the other one fires, too.
        cosine: of the decoder columns; None without the SAE.
    """

    feature: int
    tokens: int
    within: float
    cosine: float | None = None


@dataclass(frozen=True)
class Relations:
    """What `kin` found, as a store's record keeps it."""

    parts: tuple[Kin, ...]
    absorbers: tuple[Kin, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"parts": [asdict(one) for one in self.parts], "absorbers": [asdict(one) for one in self.absorbers]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Relations:
        """What `to_json` wrote."""
        parts, absorbers = (tuple(Kin(**one) for one in data[name]) for name in ("parts", "absorbers"))
        return cls(parts, absorbers)


def kin(
    store: FeatureStore, layer: int, feature: int, sae: SAE | None = None, n: int = 10
) -> tuple[tuple[Kin, ...], tuple[Kin, ...]]:
    """Parts of a feature, and features that may have absorbed cases of it, at most `n` each.

    A part is rarer and fires nearly only where the feature does: the dictionary has split it. An absorber has a like
    direction and fires where the feature does not: tokens on which the feature would be expected may go to it (Chanin
    et al. 2024 measure that with a probe; here it is a suspicion). Parts by tokens, absorbers by cosine, largest first.

    Args:
        sae: for cosines; without it there are no absorbers.
    """
    check_count("n", n)
    table = store.cofiring(layer, feature, None)
    both = np.zeros(store.layer(layer).d_sae, np.int64)
    both[table["feature"].to_numpy()] = table["both"].to_numpy()
    tokens = store.stats(layer)["tokens"].to_numpy()
    within = both / np.maximum(tokens, 1)
    known = tokens >= FEWEST
    known[feature] = False
    near = None if sae is None else cosines(sae, torch.as_tensor(sae.W_dec[:, feature]))

    def shown(some: np.ndarray) -> tuple[Kin, ...]:
        return tuple(
            Kin(f, int(tokens[f]), float(within[f]), None if near is None else float(near[f]))
            for f in some[:n].tolist()
        )

    parts = np.flatnonzero(known & (within >= WITHIN) & (tokens < tokens[feature]))
    parts = parts[np.argsort(-tokens[parts], kind="stable")]
    if near is None:
        return shown(parts), ()
    apart = np.flatnonzero(known & (within <= APART) & (near >= ALIKE))
    return shown(parts), shown(apart[np.argsort(-near[apart], kind="stable")])

"""Features near a feature: of like direction, firing on the same tokens, and the same one in other layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qwen_scope.errors import MismatchError, check_count
from qwen_scope.scope import Scope
from qwen_scope.store import FeatureStore

from .effects import cosines


@dataclass(frozen=True)
class Neighbour:
    """A feature near another.

    Attributes:
        layer, feature: which.
        cosine: of the two decoder columns, or None where it was not computed.
        jaccard: tokens where both fire over tokens where either does, or None.
        both: on how many tokens both fire, or None.
    """

    layer: int
    feature: int
    cosine: float | None = None
    jaccard: float | None = None
    both: int | None = None


def similar(
    scope: Scope, layer: int, feature: int, n: int = 10, *, other_layer: int | None = None
) -> tuple[Neighbour, ...]:
    """The features whose decoder columns have the largest cosine with this feature's, largest first.

    Args:
        other_layer: look there instead of in the feature's own layer.

    Raises:
        MismatchError: there is no such feature.
    """
    sae = scope.saes[scope.check_layers([layer])[0]]
    if not 0 <= feature < sae.d_sae:
        raise MismatchError(f"layer {layer} has features 0 to {sae.d_sae - 1}, not {feature}")
    other = layer if other_layer is None else scope.check_layers([other_layer])[0]
    check_count("n", n)
    near = cosines(scope.saes[other], sae.W_dec[:, feature])
    if other == layer:
        near[feature] = -np.inf
    best = np.argsort(-near, kind="stable")[: min(n, len(near) - (other == layer))]
    return tuple(Neighbour(other, int(f), cosine=float(near[f])) for f in best)


def cofiring(
    store: FeatureStore, layer: int, feature: int, n: int = 10, *, other_layer: int | None = None
) -> tuple[Neighbour, ...]:
    """The features that fire on the same tokens as this one, highest Jaccard first."""
    other = layer if other_layer is None else other_layer
    rows = store.cofiring(layer, feature, n, other_layer=other_layer).to_pylist()
    return tuple(Neighbour(other, r["feature"], jaccard=r["jaccard"], both=r["both"]) for r in rows)


def elsewhere(
    layer: int,
    feature: int,
    layers: Sequence[int],
    *,
    scope: Scope | None = None,
    store: FeatureStore | None = None,
) -> tuple[Neighbour, ...]:
    """The same feature in other layers: per layer the one that fires on the same tokens, else that of like direction.

    Firing decides where there is a store, because the residual stream turns from layer to layer and directions alone
    drift apart. The cosine stands beside it where there is a scope. A layer without any candidate is left out.

    Raises:
        MismatchError: the store was made with another SAE than the scope's.
    """
    if scope is not None and store is not None:
        store.require(layer, scope.saes[layer])
    out = []
    for other in layers:
        if other == layer:
            continue
        fires = cofiring(store, layer, feature, 1, other_layer=other) if store is not None else ()
        if scope is None:
            out += fires
        elif store is None or not fires:
            out += similar(scope, layer, feature, 1, other_layer=other)
        else:
            store.require(other, scope.saes[other])
            near = cosines(scope.saes[other], scope.saes[layer].W_dec[:, feature])
            out += [replace(one, cosine=float(near[one.feature])) for one in fires]
    return tuple(out)

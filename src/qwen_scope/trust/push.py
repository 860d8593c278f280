"""Whether adding a feature makes texts of its concept likelier than others: a causal test without generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from qwen_scope.errors import InputError
from qwen_scope.features import fire_alike, of_concept
from qwen_scope.scope import Scope
from qwen_scope.stats import Interval, bootstrap, difference
from qwen_scope.steer import Intervention, Row, log_probabilities, resolve
from qwen_scope.store import FeatureStore

from .concept import Concept, documents_with, token_ids_of

AMOUNT, DOSES = 1.0, (0.25, 0.5, 1.0)
"""Of the layer's median residual norm: the dose that is compared with controls, and those that are shown."""
TEXTS, TOKENS, RANDOMS = 16, 48, 19


@dataclass(frozen=True)
class Push:
    """What adding a feature does to the log-probability per token of documents, in nats.

    Attributes:
        concept: whose documents.   amount: in units of the layer's median residual norm.   texts: of each kind.
        effect: the change on documents with the concept minus that on documents without, with its interval.
        opposite: the same with the sign turned.
        on_concept, on_others: the two changes themselves: what it costs.
        doses: amount and effect of each.
        randoms: the effects of other features that fire about as often, with the same length of change.
    """

    concept: str
    amount: float
    texts: int
    effect: Interval
    opposite: Interval
    on_concept: Interval
    on_others: Interval
    doses: tuple[tuple[float, float], ...]
    randoms: tuple[float, ...]

    @property
    def beaten(self) -> float:
        """The share of random features with a smaller effect."""
        return float(np.mean([one < self.effect.estimate for one in self.randoms]))

    @property
    def causal(self) -> bool:
        """Whether it moves the concept: more than nothing, than every random feature, and than the opposite sign."""
        return self.effect.low > 0 and self.beaten == 1 and self.opposite.high < self.effect.low

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "beaten": self.beaten, "causal": self.causal}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Push:
        """What `to_json` wrote."""
        names = ("effect", "opposite", "on_concept", "on_others")
        lists = {"doses": tuple(map(tuple, data["doses"])), "randoms": tuple(data["randoms"])}
        found = {name: data[name] for name in cls.__dataclass_fields__}
        return cls(**found | {name: Interval(**data[name]) for name in names} | lists)  # type: ignore[arg-type]


def push(
    scope: Scope,
    store: FeatureStore,
    layer: int,
    feature: int,
    concept: Concept,
    *,
    amount: float = AMOUNT,
    texts: int = TEXTS,
    tokens: int = TOKENS,
    randoms: int = RANDOMS,
    seed: int = 0,
) -> Push:
    """Score documents of a store with and without the concept under the feature and its controls.

    Random features fire about as often as this one, and are not of the concept: one that fires over twice as often in
    its documents is never drawn.

    Raises:
        InputError: too few documents of either kind, or no feature to compare with.
        MismatchError: the store was made with another SAE.
    """
    sae = scope.saes[layer]
    store.require(layer, sae)
    rng = np.random.default_rng((seed, layer, feature))
    has = documents_with(store, concept)
    chosen = [rng.permutation(np.flatnonzero(which))[:texts] for which in (has, ~has)]
    # A document of one token has nothing to predict.
    ids = [[one for one in token_ids_of(store, some, tokens) if len(one) > 1] for some in chosen]
    if min(map(len, ids)) < 2:
        raise InputError(f"{len(ids[0])} documents with {concept} and {len(ids[1])} without are too few to score")
    rows = [[Row(tuple(one)) for one in side] for side in ids]
    point = scope.hook_point(layer)

    def added(which: int, dose: float) -> list[Intervention]:
        one = Intervention.add(layer=point, feature=which, amount=dose, unit="resid_norm")
        return resolve(scope.model, [one], scope.saes, scope.stats)

    def changes(done: Sequence[Intervention]) -> list[np.ndarray]:
        return [
            np.array([float(one.mean()) for one in log_probabilities(scope.model, side, done, scope.saes)])
            for side in rows
        ]

    plain = changes([])

    def moved(which: int, dose: float) -> list[np.ndarray]:
        return [a - b for a, b in zip(changes(added(which, dose)), plain, strict=True)]

    mine, turned = moved(feature, amount), moved(feature, -amount)
    doses = {dose: (mine if dose == 1 else moved(feature, dose * amount)) for dose in DOSES}
    others = controls(store, layer, feature, has, sae.W_dec, randoms, rng)
    return Push(
        str(concept),
        amount,
        min(map(len, ids)),
        difference(mine[0], mine[1], seed=seed),
        difference(turned[0], turned[1], seed=seed),
        bootstrap(mine[0], seed=seed),
        bootstrap(mine[1], seed=seed),
        tuple((dose * amount, _apart(both)) for dose, both in doses.items()),
        tuple(_apart(moved(other, amount)) for other in others),
    )


def controls(
    store: FeatureStore,
    layer: int,
    feature: int,
    has: np.ndarray,
    W_dec: torch.Tensor,
    n: int,
    rng: np.random.Generator,
) -> list[int]:
    """Features that fire about as often as one, none of its concept and none without a direction.

    Raises:
        InputError: fewer than `n`.
    """
    stats = store.stats(layer)
    rate = stats["frequency"].to_numpy()
    query = "SELECT document, feature, count(*) AS n FROM activations WHERE layer = ? GROUP BY ALL"
    inside = np.zeros(len(rate))
    for batch in store.stream(query, [layer]):
        document, some, counts = (column.to_numpy() for column in batch.columns)
        np.add.at(inside, some[has[document]], counts[has[document]])
    lengths = store.tables["documents"].read(0, store.manifest.documents, ["tokens"])["tokens"].to_numpy()
    here, there = max(1, lengths[has].sum()), max(1, lengths[~has].sum())
    outside = stats["tokens"].to_numpy() - inside
    avoid = np.flatnonzero(of_concept(inside / here, outside / there)).tolist()
    near = fire_alike(feature, rate, W_dec, avoid)
    if len(near) < n:
        raise InputError(f"layer {layer} has {len(near)} features to compare with; {n} are needed")
    return rng.choice(near, n, replace=False).tolist()


def _apart(both: Sequence[np.ndarray]) -> float:
    return float(both[0].mean() - both[1].mean())

"""Whether a feature is the same on two halves of the documents: its tokens and its company, beside other features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from scipy.stats import binom

from qwen_scope.errors import InputError
from qwen_scope.features import Neighbour, fire_alike
from qwen_scope.sae import SAE
from qwen_scope.store import FeatureStore

CONTROLS = 19
GOLDEN, WORD = 2654435761, 2**32
"""A document lies in the second half if its number times the first, modulo the second, lies above half of the latter
(Knuth's multiplicative hashing): even halves of every stretch of the corpus, and of every second or third document."""
BEYOND = 0.99


@dataclass(frozen=True)
class Halves:
    """A feature on two halves of the documents of a store.

    Attributes:
        documents, tokens: of each half, and on how many tokens it fires there.
        overlap: of the tokens (by their ids) it fires on in the one half and in the other: the Bhattacharyya
            coefficient of the two distributions, 0 for none in common and 1 for the same.
        chance: the largest overlap of its first half with the second half of `controls` other features that fire about
            as often; None where there are none.
        partners, jaccards: the feature of its layer that fires most with it on each half, and how often.
    """

    documents: tuple[int, int]
    tokens: tuple[int, int]
    overlap: float
    chance: float | None
    controls: int
    partners: tuple[int | None, int | None]
    jaccards: tuple[float, float]

    @property
    def found(self) -> bool | None:
        """Whether the second half has the feature of the first, and no other that looks more like it."""
        return None if self.chance is None else self.overlap > self.chance

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "found": self.found}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Halves:
        """What `to_json` wrote."""
        found = {name: data[name] for name in cls.__dataclass_fields__}
        lists: dict[str, Any] = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
        return cls(**{**found, **lists})


def second_half(documents: Int64[np.ndarray, " n"], seed: int = 0) -> Bool[np.ndarray, " n"]:
    """Which documents lie in the second half."""
    return (np.asarray(documents).astype(np.uint64) + np.uint64(seed)) * np.uint64(GOLDEN) % np.uint64(
        WORD
    ) >= WORD // 2


def halves(store: FeatureStore, layer: int, feature: int, sae: SAE | None = None, seed: int = 0) -> Halves:
    """Measure a feature on both halves.

    Args:
        sae: its dictionary, for controls that have a direction; without it any feature that fires may be one.

    Raises:
        NotFoundError: no such feature.   InputError: it fires in one half alone, or in none.
    """
    store.check_feature(layer, feature)
    rates = store.stats(layer)["frequency"].to_numpy()
    W_dec = None if sae is None else sae.W_dec
    others = fire_alike(feature, rates, W_dec)[:CONTROLS]
    counts = _tokens_of(store, layer, [feature, *others], seed)
    mine = counts[feature]
    tokens = (sum(mine[0].values()), sum(mine[1].values()))
    if not all(tokens):
        raise InputError(f"layer {layer}, feature {feature} does not fire in both halves of {store.folder}")
    overlaps = [_overlap(mine[0], counts[other][1]) for other in others]
    partners, jaccards = _company(store, layer, feature, seed)
    later = int(second_half(np.arange(store.manifest.documents), seed).sum())
    return Halves(
        (store.manifest.documents - later, later), tokens, _overlap(*mine), max(overlaps, default=None), len(others),
        partners, jaccards,
    )  # fmt: skip


def _is_later(seed: int) -> str:
    """`second_half` of the column `document`, in SQL."""
    return f"(document + {seed}) * {GOLDEN} % {WORD} >= {WORD // 2}"


def _tokens_of(
    store: FeatureStore, layer: int, features: list[int], seed: int
) -> dict[int, tuple[dict[int, int], dict[int, int]]]:
    """Per feature and half how often it fires on which token id."""
    query = f"""
        SELECT feature, {_is_later(seed)} AS later, token, count(*) AS n
        FROM features JOIN tokens USING (document, position)
        WHERE layer = ? AND feature IN ({", ".join(map(str, features))}) GROUP BY ALL"""
    out: dict[int, tuple[dict[int, int], dict[int, int]]] = {one: ({}, {}) for one in features}
    columns = (column.to_pylist() for column in store.sql(query, [layer]).select(["feature", "later", "token", "n"]))
    for one, later, token, n in zip(*columns, strict=True):
        out[one][int(later)][token] = n
    return out


def _overlap(a: Mapping[int, int], b: Mapping[int, int]) -> float:
    """The Bhattacharyya coefficient of two counts."""
    both = sum((n * b[token]) ** 0.5 for token, n in a.items() if token in b)
    return both / max(1, sum(a.values()) * sum(b.values())) ** 0.5


def _company(
    store: FeatureStore, layer: int, feature: int, seed: int
) -> tuple[tuple[int | None, int | None], tuple[float, float]]:
    """The feature of the same layer with the highest Jaccard index of tokens on each half."""
    query = f"""
        WITH mine AS (SELECT document, position FROM features WHERE layer = $layer AND feature = $feature),
        here AS (SELECT feature, document, position, {_is_later(seed)} AS later FROM activations WHERE layer = $layer),
        shared AS (
          SELECT feature, later, count(*) AS n FROM here SEMI JOIN mine USING (document, position) GROUP BY ALL),
        total AS (SELECT feature, later, count(*) AS n FROM here GROUP BY ALL),
        own AS (SELECT later, n FROM total WHERE feature = $feature)
        SELECT later, feature, shared.n::DOUBLE / (total.n + own.n - shared.n) AS jaccard
        FROM shared JOIN total USING (feature, later) JOIN own USING (later) WHERE feature <> $feature
        QUALIFY row_number() OVER (PARTITION BY later ORDER BY jaccard DESC, feature) = 1"""
    partner: list[int | None] = [None, None]
    jaccard = [0.0, 0.0]
    for row in store.sql(query, {"layer": layer, "feature": feature}).to_pylist():
        partner[int(row["later"])], jaccard[int(row["later"])] = row["feature"], row["jaccard"]
    return (partner[0], partner[1]), (jaccard[0], jaccard[1])


def chance_jaccard(tokens: int, others: Int64[np.ndarray, " d_sae"], of: int) -> float:
    """The Jaccard index that the best of a layer's features does not exceed in 99 of 100 shuffles of its tokens.

    Where firing has nothing to do with each other, a feature on `others[i]` of `of` tokens meets one on `tokens` of
    them on a hypergeometric number, here its binomial, which lies a little higher; the best of all stays below
    the quantile `0.99 ** (1 / features)` of each.

    Args:
        tokens: on how many tokens the feature fires.   others: those of the other layer.   of: how many count.
    """
    n = np.unique(others[others > 0])
    if not len(n) or not tokens or not of:
        return 0.0
    both = binom.ppf(BEYOND ** (1 / (others > 0).sum()), tokens, np.minimum(n / of, 1.0))
    both = np.minimum(both, np.minimum(n, tokens))
    return float((both / (tokens + n - both)).max())


@dataclass(frozen=True)
class Layer:
    """The best partner in another layer of the store, by co-firing; a feature of one layer need not be in the next.

    Attributes:
        layer, feature: which.   cosine: of the decoder columns, None without the SAEs.
        jaccard: tokens on which both fire over those on which either does.
        chance: what the best of that layer does not exceed in 99 of 100 shuffles.
    """

    layer: int
    feature: int
    cosine: float | None
    jaccard: float | None
    chance: float

    @property
    def found(self) -> bool:
        """Whether they fire together beyond chance."""
        return self.jaccard is not None and self.jaccard > self.chance

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "found": self.found}


def layers_beside_chance(
    store: FeatureStore, layer: int, feature: int, found: tuple[Neighbour, ...]
) -> tuple[Layer, ...]:
    """The partners in other layers, each with what chance gives."""
    tokens = store.feature(layer, feature).tokens
    out = []
    for one in found:
        counts = store.stats(one.layer)["tokens"].to_numpy()
        of = min(store.layer(layer).tokens, store.layer(one.layer).tokens)
        out.append(Layer(one.layer, one.feature, one.cosine, one.jaccard, chance_jaccard(tokens, counts, of)))
    return tuple(out)

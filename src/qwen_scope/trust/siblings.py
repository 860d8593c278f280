"""The same feature in other dictionaries: of another k, width, seed, layer or checkpoint, each beside chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qwen_scope.features import MatchOptions, common_firings, match
from qwen_scope.sae import SAE
from qwen_scope.store import FeatureStore

# One feature is asked about; chance is told by a sample of the others.
QUICK = MatchOptions(draws=1, sample=256)


@dataclass(frozen=True)
class Sibling:
    """The best partner of a feature in another dictionary.

    Attributes:
        name: which dictionary.   fingerprint: of its weights.
        partner: its feature, or None.   cosine: of the two decoder columns.   mutual: whether each is the other's best.
        chance: the cosine that 99 of 100 features do not exceed with a shuffled dictionary.
        cofires_with, jaccard, chance_jaccard: the same by the tokens both fire on; None where it was not measured.
        least, least_jaccard: from which values on two features are partners.
    """

    name: str
    fingerprint: str
    partner: int | None
    cosine: float
    mutual: bool
    chance: float
    least: float
    cofires_with: int | None = None
    jaccard: float | None = None
    chance_jaccard: float | None = None
    least_jaccard: float | None = None

    @property
    def found(self) -> bool:
        """Whether the dictionary has the feature: by one of the measures a partner, and beyond chance."""
        by_cosine = self.cosine >= self.least and self.cosine > self.chance
        if self.jaccard is None or self.chance_jaccard is None or self.least_jaccard is None:
            return by_cosine
        return by_cosine or (self.jaccard >= self.least_jaccard and self.jaccard > self.chance_jaccard)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "found": self.found}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sibling:
        """What `to_json` wrote."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__})


def sibling(
    name: str,
    mine: SAE,
    feature: int,
    other: SAE,
    *,
    stores: tuple[FeatureStore, int, FeatureStore, int] | None = None,
    options: MatchOptions = QUICK,
) -> Sibling:
    """Look for one feature in another dictionary.

    Args:
        stores: a store of either dictionary on the same documents, each with its layer, for co-firing.

    Raises:
        MismatchError: residuals of different widths, or stores of other documents.
        NotFoundError: there is no such feature or layer.
    """
    seen = None if stores is None else common_firings(*stores, tokens=options.tokens)
    found = match(mine, other, seen, options, features=[feature])
    partner, cosine, mutual = found.cosine.of(feature)
    one = Sibling(
        name, other.identity.fingerprint, partner if partner >= 0 else None, cosine, mutual,
        found.cosine.chance.high, options.cosine,
    )  # fmt: skip
    if found.jaccard is None or feature not in found.jaccard.features:
        return one
    cofires, jaccard, _ = found.jaccard.of(feature)
    return replace(
        one,
        cofires_with=cofires if cofires >= 0 else None,
        jaccard=jaccard,
        chance_jaccard=found.jaccard.chance.high,
        least_jaccard=options.jaccard,
    )

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
        differs: in what it is another one: `layer`, `model`, `group`, `width`, `k`; empty for the same weights.
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
    differs: tuple[str, ...] = ("weights",)

    @property
    def found(self) -> bool:
        """Whether the dictionary has the feature: by one of the measures a partner, and beyond chance.

        The same weights have every direction; there the feature has to fire on the same tokens, on another model.
        """
        by_cosine = self.cosine >= self.least and self.cosine > self.chance
        if self.jaccard is None or self.chance_jaccard is None or self.least_jaccard is None:
            return by_cosine
        by_firing = self.jaccard >= self.least_jaccard and self.jaccard > self.chance_jaccard
        if not self.differs or self.differs == ("model",):
            return by_firing and self.cofires_with == self.partner
        return by_cosine or by_firing

    @property
    def at_chance(self) -> bool:
        """Whether by no measure the partner is better than what 99 of 100 features have in a shuffled dictionary."""
        by_firing = None not in (self.jaccard, self.chance_jaccard) and self.jaccard > self.chance_jaccard  # type: ignore[operator]
        return self.cosine <= self.chance and not by_firing

    @property
    def comparable(self) -> bool:
        """Whether a feature has to be in it to be trusted: one of another layer may well lack it, and the same weights
        on the same model say nothing."""
        same_weights = not set(self.differs) - {"model"}
        return "layer" not in self.differs and (
            not same_weights or ("model" in self.differs and self.jaccard is not None)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "found": self.found, "at_chance": self.at_chance, "comparable": self.comparable}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sibling:
        """What `to_json` wrote."""
        found: dict[str, Any] = {name: data[name] for name in cls.__dataclass_fields__}
        found["differs"] = tuple(found["differs"])
        return cls(**found)


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
        found.cosine.chance.high, options.cosine, differs=_differs(mine, other, stores),
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


def _differs(mine: SAE, other: SAE, stores: tuple[FeatureStore, int, FeatureStore, int] | None) -> tuple[str, ...]:
    """In what a dictionary is another one."""
    same = mine.identity.fingerprint == other.identity.fingerprint
    pairs = {
        "layer": (mine.identity.layer, other.identity.layer),
        "model": (None, None) if stores is None else (stores[0].manifest.model, stores[2].manifest.model),
        "width": (mine.d_sae, other.d_sae),
        "k": (mine.k, other.k),
        "group": (mine.identity.group, other.identity.group),
    }
    found = tuple(
        name
        for name, (one, two) in pairs.items()
        if one != two and None not in (one, two) and (name == "model" or not same)
    )
    return found if same or found not in ((), ("model",)) else (*found, "weights")

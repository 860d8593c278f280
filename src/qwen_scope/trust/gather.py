"""What a card measures where the store's record lacks it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from qwen_scope.errors import InputError, QwenScopeError
from qwen_scope.features import (
    FeaturePage,
    Judge,
    Label,
    LabelOptions,
    Material,
    Notes,
    RuleJudge,
    TokenJudge,
    material,
    scored_label,
)
from qwen_scope.sae import SAE
from qwen_scope.scope import Scope
from qwen_scope.store import FeatureStore

from .concept import Concept
from .judged import Judged, judged
from .options import CardOptions
from .push import Push, push
from .siblings import Sibling, sibling


class Measured(Protocol):
    """What the record keeps: plain values and back."""

    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    def from_json(cls, data: dict[str, Any], /) -> Self: ...


M = TypeVar("M", bound=Measured)
CONCEPT = "concept "
"""How the names of measurements of a concept begin."""
TRIES = 5


@dataclass(frozen=True, eq=False)
class Other:
    """Another dictionary to look for the feature in.

    Attributes:
        name: shown.   sae: its weights.
        store, layer: a store of the same documents that was made with it, for co-firing.
    """

    name: str
    sae: SAE
    store: FeatureStore | None = None
    layer: int | None = None


@dataclass(frozen=True)
class Control:
    """The scores of another feature's label on the same contexts; `of` names that feature."""

    of: str
    label: Label

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"of": self.of, "label": self.label.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Control:
        """What `to_json` wrote."""
        return cls(data["of"], Label.from_json(data["label"]))


@dataclass(frozen=True)
class Record:
    """The store's record of one feature: asks it first, and keeps what had to be measured.

    Attributes:
        again: measure what it has.   reasons: by measurement why it could not be made.
    """

    notes: Notes
    layer: int
    feature: int
    again: bool = False
    reasons: dict[str, str] = field(default_factory=dict)

    def get(self, kind: type[M], name: str, measure: Callable[[], M]) -> M:
        """What is known by a name, or what is measured."""
        found = None if self.again else self.known(kind, name)
        if found is None:
            found = measure()
            self.notes.learn(self.layer, self.feature, name, found.to_json())
        return found

    def get_if_possible(self, what: str, kind: type[M], name: str, measure: Callable[[], M]) -> M | None:
        """The same, or None with the reason kept as that of `what`."""
        try:
            return self.get(kind, name, measure)
        except QwenScopeError as error:
            self.reasons[what] = str(error)
            return None

    def known(self, kind: type[M], name: str) -> M | None:
        """What the record has by a name; None also for what another version wrote in another shape."""
        found = self.notes.known(self.layer, self.feature, name)
        try:
            return None if found is None else kind.from_json(found)
        except (KeyError, TypeError, ValueError):
            return None

    def concept(self) -> Concept | None:
        """The newest concept that the feature was measured against."""
        names = [one["name"] for one in self.notes.measured(self.layer, self.feature)]
        told = [name.removeprefix(CONCEPT).partition("=") for name in names if name.startswith(CONCEPT)]
        return Concept(told[-1][0], told[-1][2]) if told else None


def judge_for(page: FeaturePage, judge: Judge | None) -> Judge | None:
    """Who may judge the label of a page: who was given, or for one that no model wrote the rules that made it."""
    if judge is not None or page.label is None:
        return judge
    return next((one() for one in (RuleJudge, TokenJudge) if one.scorer == page.label.scorer), None)


def control_of(
    record: Record, page: FeaturePage, store: FeatureStore, judge: Judge | None, seed: int
) -> Control | None:
    """The label of a random other feature on the contexts that test this one's; None where it could not be scored."""
    label = page.label
    if label is None:
        return None
    name = f"control of {label.text!r}, seed {seed}"
    if judge is None or judge.scorer != label.scorer:
        record.reasons["control"] = f"{label.scorer} judged this label, and has to judge the other one"
        return record.known(Control, name)

    def measure() -> Control:
        drawn = material(store, record.layer, record.feature, LabelOptions(seed=seed))
        other, text = another_name(record, store, judge, label.text, seed)
        return Control(other, scored_label(drawn, judge, text))

    return record.get_if_possible("control", Control, name, measure)


def another_name(record: Record, store: FeatureStore, judge: Judge, text: str, seed: int) -> tuple[str, str]:
    """A random other feature with a name of this judge, drawn from the store's labels or else named now.

    Raises:
        InputError: no feature that was drawn could be named.   BadAnswer, BudgetSpent: the judge gives no name.
    """
    place = (record.layer, record.feature)
    rng = np.random.default_rng((seed, *place))
    labels = record.notes.labels()
    known = [p for p, one in labels.items() if p != place and one.text != text and one.scorer == judge.scorer]
    if known:
        chosen = sorted(known)[int(rng.integers(len(known)))]
        return f"{chosen[0]}/{chosen[1]}", labels[chosen].text
    documents = store.stats(record.layer)["documents"].to_numpy()
    some = np.flatnonzero((documents >= 2 * LabelOptions().tests) & (np.arange(len(documents)) != record.feature))
    for other in rng.permutation(some)[:TRIES].tolist():
        try:
            drawn: Material = material(store, record.layer, other, LabelOptions(seed=seed))
        except InputError:  # too few contexts of it; another one may do
            continue
        if (name := judge.explain(drawn.examples)) != text:
            return f"{record.layer}/{other}", name
    raise InputError(f"no other feature of layer {record.layer} fires in enough documents to be named")


def judged_by(
    record: Record, page: FeaturePage, store: FeatureStore, judge: Judge | None, scope: Scope | None, seed: int
) -> Judged | None:
    """FADE's measures of the label by its judge; None where nobody could be asked."""
    if page.label is None:
        return None
    name = f"FADE of {page.label.text!r}, seed {seed}{'' if scope is None else ', with texts'}"
    if judge is None:
        record.reasons["clarity"] = f"{page.label.scorer} judges this label, and was not asked"
        return record.known(Judged, name)
    given = (store, record.layer, record.feature, page.label.text, judge, scope, seed)
    return record.get_if_possible("clarity", Judged, name, lambda: judged(*given))


def pushed(
    record: Record, store: FeatureStore, scope: Scope | None, concept: Concept | None, o: CardOptions
) -> Push | None:
    """The test by likelihood: from the record, or measured where that was asked for."""
    if concept is None:
        return None
    name = f"effect on {concept}"
    if not o.effect or scope is None:
        return record.known(Push, name)
    place = (record.layer, record.feature)
    return record.get(Push, name, lambda: push(scope, store, *place, concept, texts=o.texts, seed=o.seed))


def in_other(record: Record, store: FeatureStore, mine: SAE | None, other: Other) -> Sibling:
    """The feature in another dictionary.

    Raises:
        InputError: its own SAE is not known.   MismatchError: residuals of another width, or other documents.
    """
    if mine is None:
        raise InputError("looking for a feature in another dictionary takes the SAE of its own; leave no_model out")
    both = None if other.store is None or other.layer is None else (store, record.layer, other.store, other.layer)
    name = f"sibling {other.sae.identity.fingerprint[:16]}"
    if both is not None:
        name += f" on {both[2].manifest.model}, layer {both[3]}"
    found = record.get(Sibling, name, lambda: sibling(other.name, mine, record.feature, other.sae, stores=both))
    return replace(found, name=other.name)

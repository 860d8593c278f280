"""`Rule`: a classifier made of features alone, as a file.

A rule calls a document positive if any of its features exceeds its threshold on any token (OR, no weights), as in the
Qwen-Scope report. Its file is JSON with exactly these keys: `format` ("qwen-scope-rule"), `version` (1), `name`,
`features`, and `about` (an object: how it was made). An entry of `features` has `layer`, `feature` (its index),
`threshold` (0 or more; the activation must be above it), `scale` (above 0, the feature's largest activation on the
positive seeds: what values are divided by to compare features), `delta` (the share of positive seeds on which it fires
minus that of negative ones) and `sae` (the fingerprint of the SAE whose feature it is).

A weighted rule has `intercept` beside them and `weight` in every entry: positive where `intercept` plus the sum of
`weight` times a feature's largest activation, over its `scale`, is above 0. Its thresholds are 0 and not asked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError, check_share
from qwen_scope.files import Fields, read_object, write_text
from qwen_scope.report import HasFrames, Table
from qwen_scope.text import Counted

from .dataset import Dataset

FORMAT, VERSION = "qwen-scope-rule", 1


@dataclass(frozen=True)
class RuleFeature:
    """One feature of a rule; the fields are those of the file, `weight` None where the rule has none."""

    layer: int
    feature: int
    threshold: float
    scale: float
    delta: float
    sae: str
    weight: float | None = None


@dataclass(frozen=True)
class Evidence:
    """Why a document was called positive: which feature exceeded its threshold (or spoke for it) where, how strong."""

    layer: int
    feature: int
    position: int
    value: float


@dataclass(frozen=True, repr=False)
class Rule(HasFrames):
    """Positive if any feature exceeds its threshold on any token, or by the sum of weighted features.

    Attributes:
        name: of the property.   features: at least one.   about: how it was made, as plain data.
        intercept: of a weighted rule; None where the features are joined by OR.

    Raises:
        InputError: weights without an intercept, an intercept without weights, or a feature without its weight.
    """

    name: str
    features: tuple[RuleFeature, ...]
    about: dict[str, Any] = field(default_factory=dict)
    intercept: float | None = None

    def __post_init__(self) -> None:
        if any((f.weight is None) != (self.intercept is None) for f in self.features):
            raise InputError(
                f"the rule {self.name!r} needs an intercept and a weight for every feature, or none of them"
            )

    @property
    def weighted(self) -> bool:
        """Whether its features have weights; else they are joined by OR."""
        return self.intercept is not None

    @property
    def layers(self) -> list[int]:
        return sorted({f.layer for f in self.features})

    def sheet(self) -> Table:
        """A row per feature."""
        told = "by their weighted sum" if self.weighted else "where any of these exceeds its threshold"
        return Table.of(f"{self.name}: positive {told}", self.features)

    @property
    def counted(self) -> Counted:
        """Which tokens counted when it was fitted: all of them where it does not say.

        Raises:
            FormatError: its file says something else there.
        """
        data = self.about.get("counted")
        return Counted.everything() if data is None else Counted.from_json(data, f"'counted' of the rule {self.name!r}")

    def values(self, layers: Mapping[int, Dataset]) -> Float64[np.ndarray, "items features"]:
        """The largest activation of each of the rule's features on each item.

        Args:
            layers: the items at each layer of the rule, reduced by `max`.

        Raises:
            NotFoundError: a layer is missing.   MismatchError: firings of another SAE, or not reduced by `max`.
        """
        out = np.zeros((len(next(iter(layers.values()))), len(self.features)))
        for i, f in enumerate(self.features):
            if f.layer not in layers:
                raise NotFoundError(f"the rule {self.name!r} needs layer {f.layer}; there are {sorted(layers)}")
            data = layers[f.layer]
            self.check_sae(f.layer, data.sae, data.width)
            if data.reduction != "max":
                raise MismatchError(f"a rule needs firings reduced by 'max', not by {data.reduction!r}")
            rows = data.feature == f.feature
            out[data.item[rows], i] = data.value[rows]
        return out

    def check_sae(self, layer: int, fingerprint: str, width: int) -> None:
        """Refuse an SAE that the rule's features of a layer are not of, or that has fewer features than they need.

        Raises:
            MismatchError: another fingerprint, or a feature from `width` up, which would never fire.
        """
        for f in self.features:
            if f.layer == layer and f.sae != fingerprint:
                raise MismatchError(
                    f"the rule {self.name!r} is about the SAE {f.sae[:12]} of layer {layer}, not {fingerprint[:12]}"
                )
            if f.layer == layer and f.feature >= width:
                raise MismatchError(
                    f"the rule {self.name!r} names feature {f.feature} of layer {layer}, whose SAE has features 0 to"
                    f" {width - 1}"
                )

    def decide(self, layers: Mapping[int, Dataset]) -> Bool[np.ndarray, " items"]:
        """Which items are positive."""
        return self.positive(self.values(layers))

    def positive(self, values: Float64[np.ndarray, "items features"]) -> Bool[np.ndarray, " items"]:
        """Which items are, by the largest activation of each feature."""
        if self.weighted:
            return self.strength(values) > 0
        return np.asarray((values > np.array([f.threshold for f in self.features])).any(1))

    def scores(self, layers: Mapping[int, Dataset]) -> Float64[np.ndarray, " items"]:
        """How strongly: the largest activation in units of its feature's scale, 0 where none fires; or the sum."""
        return self.strength(self.values(layers))

    def strength(self, values: Float64[np.ndarray, "items features"]) -> Float64[np.ndarray, " items"]:
        """The scores, by the largest activation of each feature."""
        scaled = values / np.array([f.scale for f in self.features])
        if self.intercept is None:
            return scaled.max(1)
        return self.intercept + scaled @ np.array([f.weight for f in self.features], np.float64)

    def trace(self, layers: Mapping[int, Dataset], item: int) -> list[Evidence]:
        """The evidence for one item, the strongest first (in units of scale, times the weight); empty where negative.

        Of a weighted rule these are the features that speak for it; others may speak against.
        """
        if self.weighted and not self.decide({layer: data.take([item]) for layer, data in layers.items()})[0]:
            return []
        found = []
        for f in self.features:
            data, weight = layers[f.layer], 1.0 if f.weight is None else f.weight
            for row in np.flatnonzero((data.item == item) & (data.feature == f.feature)):
                if data.value[row] > f.threshold and weight > 0:
                    evidence = Evidence(f.layer, f.feature, int(data.position[row]), float(data.value[row]))
                    found.append((-evidence.value * weight / f.scale, evidence.layer, evidence.feature, evidence))
        return [one[-1] for one in sorted(found, key=lambda one: one[:3])]

    def calibrated(self, negatives: Mapping[int, Dataset], fpr: float) -> Rule:
        """The rule with thresholds that call at most a share `fpr` of these negative documents positive.

        Each feature alone passes the same number of them, the largest for which all features together keep to `fpr`:
        a feature that fires on many negative documents gets a high threshold and leaves the others alone. A weighted
        rule gets a lower intercept instead.

        Raises:
            InputError: a rate that is not in [0, 1).
        """
        check_share("a false-positive rate", fpr, zero=True, one=False)
        values = self.values(negatives)
        passing = int(np.floor(fpr * len(values) + 1e-9))
        about = {**self.about, "calibrated": {"fpr": fpr, "negatives": len(values)}}
        if self.intercept is not None:
            scores = np.sort(self.scores(negatives))[::-1]
            return replace(self, intercept=self.intercept - max(0.0, float(scores[passing])), about=about)
        ranked = -np.sort(-values, axis=0)
        while passing and (values > ranked[passing]).any(1).mean() > fpr + 1e-12:
            passing -= 1
        features = tuple(replace(f, threshold=float(t)) for f, t in zip(self.features, ranked[passing], strict=True))
        return replace(self, features=features, about=about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file."""
        write_text(path, json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n")

    def to_json(self) -> dict[str, Any]:
        """The object that the file holds."""
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        if not self.weighted:  # as programs before weights read it
            del data["intercept"]
            data["features"] = [
                {key: value for key, value in one.items() if key != "weight"} for one in data["features"]
            ]
        return data

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rule:
        """Read a file that `save` wrote.

        Raises:
            NotFoundError: there is none.   FormatError: it is no rule, or not one of this version.
        """
        return cls.from_json(read_object(path), f"the rule {path}")

    @classmethod
    def from_json(cls, data: Any, what: str) -> Rule:
        """The object that a rule's file holds; `what` is what an error calls it.

        Raises:
            FormatError: it is no rule, or not one of this version.
        """
        found = Fields(data, what)
        found.header(VERSION, FORMAT)
        found = Fields(found.data, what, ("format", "version", "name", "features", "about"), ("intercept",))
        intercept = found.number("intercept") if "intercept" in found.data else None
        features = tuple(_feature(what, entry, intercept is not None) for entry in found.items("features"))
        if not features:
            raise FormatError(f"{what} has no feature")
        return cls(found.text("name"), features, found.object("about"), intercept)


def _feature(rule: str, entry: Any, weighted: bool) -> RuleFeature:
    """One entry of a rule's file, strictly."""
    keys = [f.name for f in fields(RuleFeature) if weighted or f.name != "weight"]
    one = Fields(entry, f"a feature of {rule}", keys)
    scale = one.number("scale", 0)
    if not scale:
        raise FormatError(f"'scale' of {one.what} is above 0: values are divided by it")
    return RuleFeature(
        one.count("layer"),
        one.count("feature"),
        one.number("threshold", 0),
        scale,
        one.number("delta", -1, 1),
        one.text("sae"),
        one.number("weight") if weighted else None,
    )

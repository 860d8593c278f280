"""`Rule`: a classifier made of features alone, as a file.

A rule calls a document positive if any of its features exceeds its threshold on any token (OR, no weights). Its file is
JSON with exactly these keys: `format` ("qwen-scope-rule"), `version` (1), `name`, `features`, and `about` (an object:
how it was made). An entry of `features` has `layer`, `feature` (its index), `threshold` (0 or more; the activation must
be above it), `scale` (above 0, the feature's largest activation on the positive seeds: what values are divided by
to compare features), `delta` (the share of positive seeds on which it fires minus that of negative ones) and `sae` (the
fingerprint of the SAE whose feature it is).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from qwen_scope.errors import FormatError, MismatchError, NotFoundError, check_share
from qwen_scope.files import Fields, read_object, write_text
from qwen_scope.text import Counted

from .dataset import Dataset

FORMAT, VERSION = "qwen-scope-rule", 1


@dataclass(frozen=True)
class RuleFeature:
    """One feature of a rule; the fields are those of the file."""

    layer: int
    feature: int
    threshold: float
    scale: float
    delta: float
    sae: str


@dataclass(frozen=True)
class Evidence:
    """Why a document was called positive: which feature exceeded its threshold where, and how strong it was."""

    layer: int
    feature: int
    position: int
    value: float


@dataclass(frozen=True)
class Rule:
    """Positive if any feature exceeds its threshold on any token.

    Attributes:
        name: of the property.   features: at least one.   about: how it was made, as plain data.
    """

    name: str
    features: tuple[RuleFeature, ...]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        return sorted({f.layer for f in self.features})

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
        above = self.values(layers) > np.array([f.threshold for f in self.features])
        return np.asarray(above.any(1))

    def scores(self, layers: Mapping[int, Dataset]) -> Float64[np.ndarray, " items"]:
        """How strongly: the largest activation in units of its feature's scale; 0 where none fires."""
        return (self.values(layers) / np.array([f.scale for f in self.features])).max(1)

    def trace(self, layers: Mapping[int, Dataset], item: int) -> list[Evidence]:
        """The evidence for one item, the strongest in units of scale first; empty where it is called negative."""
        found = []
        for f in self.features:
            data = layers[f.layer]
            for row in np.flatnonzero((data.item == item) & (data.feature == f.feature)):
                if data.value[row] > f.threshold:
                    evidence = Evidence(f.layer, f.feature, int(data.position[row]), float(data.value[row]))
                    found.append((-evidence.value / f.scale, evidence.layer, evidence.feature, evidence))
        return [one[-1] for one in sorted(found, key=lambda one: one[:3])]

    def calibrated(self, negatives: Mapping[int, Dataset], fpr: float) -> Rule:
        """The rule with thresholds that call at most a share `fpr` of these negative documents positive.

        Each feature alone passes the same number of them, the largest for which all features together keep to `fpr`:
        a feature that fires on many negative documents gets a high threshold and leaves the others alone.

        Raises:
            InputError: a rate that is not in [0, 1).
        """
        check_share("a false-positive rate", fpr, zero=True, one=False)
        values = self.values(negatives)
        ranked = -np.sort(-values, axis=0)
        passing = int(np.floor(fpr * len(values) + 1e-9))
        while passing and (values > ranked[passing]).any(1).mean() > fpr + 1e-12:
            passing -= 1
        features = tuple(replace(f, threshold=float(t)) for f, t in zip(self.features, ranked[passing], strict=True))
        about = {**self.about, "calibrated": {"fpr": fpr, "negatives": len(values)}}
        return replace(self, features=features, about=about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file."""
        write_text(path, json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n")

    def to_json(self) -> dict[str, Any]:
        """The object that the file holds."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

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
        found = Fields(found.data, what, ("format", "version", "name", "features", "about"))
        features = tuple(_feature(what, entry) for entry in found.items("features"))
        if not features:
            raise FormatError(f"{what} has no feature")
        return cls(found.text("name"), features, found.object("about"))


def _feature(rule: str, entry: Any) -> RuleFeature:
    """One entry of a rule's file, strictly."""
    one = Fields(entry, f"a feature of {rule}", [f.name for f in fields(RuleFeature)])
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
    )

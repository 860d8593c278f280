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
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError
from qwen_scope.files import write_text

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
            if data.sae != f.sae:
                raise MismatchError(
                    f"the rule {self.name!r} is about the SAE {f.sae[:12]} of layer {f.layer}, not {data.sae[:12]}"
                )
            if data.reduction != "max":
                raise MismatchError(f"a rule needs firings reduced by 'max', not by {data.reduction!r}")
            rows = data.feature == f.feature
            out[data.item[rows], i] = data.value[rows]
        return out

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
        if not 0 <= fpr < 1:
            raise InputError(f"a false-positive rate lies from 0 to below 1, not at {fpr}")
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
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_text(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rule:
        """Read a file that `save` wrote.

        Raises:
            NotFoundError: there is none.   FormatError: it is no rule, or not one of this version.
        """
        data = read_json(path)
        if data.get("format") != FORMAT:
            raise FormatError(f"{path} is no rule: it does not say it is of the format {FORMAT!r}")
        if data.get("version") != VERSION:
            raise FormatError(f"{path} is a rule of version {data.get('version')!r}; this package reads {VERSION}")
        if set(data) != {"format", "version", "name", "features", "about"} or not isinstance(data["features"], list):
            raise FormatError(f"{path} does not have exactly the keys format, version, name, features and about")
        if not isinstance(data["name"], str) or not isinstance(data["about"], dict) or not data["features"]:
            raise FormatError(f"{path} needs a name, an object 'about' and at least one feature")
        return cls(data["name"], tuple(read_feature(path, entry) for entry in data["features"]), data["about"])


def read_feature(path: str | os.PathLike[str], entry: Any) -> RuleFeature:
    """One entry of a rule's file, strictly."""
    names = [f.name for f in fields(RuleFeature)]
    if not isinstance(entry, dict) or set(entry) != set(names):
        raise FormatError(f"a feature of the rule {path} has exactly the keys {', '.join(names)}")
    for name in ("layer", "feature"):
        if not isinstance(entry[name], int) or isinstance(entry[name], bool) or entry[name] < 0:
            raise FormatError(f"{name!r} of a feature of {path} is a count, not {entry[name]!r:.60}")
    for name in ("threshold", "scale", "delta"):
        if not isinstance(entry[name], int | float) or not math.isfinite(entry[name]):
            raise FormatError(f"{name!r} of a feature of {path} is a finite number, not {entry[name]!r:.60}")
    if entry["threshold"] < 0 or entry["scale"] <= 0 or not isinstance(entry["sae"], str):
        raise FormatError(f"a feature of {path} has a negative threshold, no scale, or no fingerprint of its SAE")
    return RuleFeature(**entry)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        NotFoundError: there is none.   FormatError: it holds something else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"there is no file {str(path)!r}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path} holds no JSON object")
    return data


def check_count(what: str, n: int, most: int) -> None:
    """Raise InputError unless 1 <= n <= most."""
    if not 1 <= n <= most:
        raise InputError(f"{what} is from 1 to {most}, not {n}")

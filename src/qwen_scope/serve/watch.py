"""`Watch`: a rule of features that is asked of every token while it is computed, and what happens when it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_scope.analysis import Rule
from qwen_scope.errors import (
    FormatError,
    InputError,
    MismatchError,
    NotFoundError,
    check_count,
    check_name,
    nearest,
)
from qwen_scope.files import Fields, read_object
from qwen_scope.model import HookPoint
from qwen_scope.sae import feature_name, parse_feature
from qwen_scope.steer import Intervention, SAEsByLayer, Where
from qwen_scope.text import Counted

THEN = ("count", "mark", "stop", "switch")
"""What an alarm does. It is counted in any case; all but `count` mark the answer."""

VERSION = 1
MOST_WATCHES = 16
MOST_FEATURES = 64
MOST_TIMES = 10**6
FOREVER = 10**9 - 1
"""The last position that a `Where` can name."""

_KEYS = ("features", "rule", "counted", "saes", "where", "then", "times", "recipe", "interventions")


@dataclass(frozen=True)
class Watch:
    """A rule holds at a token where any of its features is above its threshold (OR, as in `analysis.Rule`).

    Attributes:
        name: in answers and metrics.
        features: as (layer, feature, threshold), sorted.
        where: which tokens are asked.
        then: one of `THEN`.
        times: an alarm is raised at the token where the rule holds for this many times in one request.
        counted: the tokens that count, as for the rule when it was fitted; the rule holds at no other.
        saes: fingerprints of the SAEs by layer, where they are known.
        recipe: for `switch`, the name of a recipe of the server; None once it is resolved.
        interventions: for `switch`, what is done from the next token on.

    Raises:
        InputError: a part that is missing, too large, or that means nothing with the others.
    """

    name: str
    features: tuple[tuple[int, int, float], ...]
    where: Where
    then: str = "mark"
    times: int = 1
    counted: Counted = field(default_factory=Counted.everything)
    saes: tuple[tuple[int, str], ...] = ()
    recipe: str | None = None
    interventions: tuple[Intervention, ...] = ()

    def __post_init__(self) -> None:
        check_name("a watch", self.name)
        if not 0 < len(self.features) <= MOST_FEATURES:
            raise InputError(f"a watch has 1 to {MOST_FEATURES} features; {self.name!r} has {len(self.features)}")
        if self.then not in THEN:
            raise InputError(f"a watch has no `then` of {self.then[:60]!r}; {nearest(self.then[:60], THEN)}")
        if self.where.nowhere:
            raise InputError("the watch covers no token; say where, such as 'generated'")
        check_count("`times` of a watch", self.times, 1, MOST_TIMES)
        switches = self.recipe is not None or bool(self.interventions)
        if switches and self.then != "switch":
            raise InputError(f"a watch with a recipe or interventions has then: 'switch', not {self.then!r}")
        if self.then == "switch" and (self.recipe is None) == (not self.interventions):
            raise InputError("a watch that switches names a recipe or lists interventions, one of the two")
        if self.recipe is not None:
            check_name("a recipe", self.recipe)
        if placed := [one for one in self.interventions if str(one.where) not in ("all", "generated")]:
            raise InputError(
                f"a recipe that is switched on acts on every token from there; its `where` is all or generated, not"
                f" {placed[0].where}"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """Where it reads."""
        return tuple(sorted({layer for layer, _, _ in self.features}))

    @property
    def by_phase(self) -> bool:
        """Whether the phases of tokens have to be known."""
        return self.where.by_phase or self.counted.phases is not None

    @property
    def follows(self) -> bool:
        """Whether the ids of generated tokens have to be known before the next one is computed."""
        later = self.where.generated or bool(self.where.generated_phases or self.where.spans)
        return bool(self.where.generated_phases) or (later and bool(self.counted.special or self.counted.phases))

    def switched(self, position: int) -> tuple[Intervention, ...]:
        """What is done to the tokens from a position on."""
        later = Where(spans=((position, FOREVER),))
        return tuple(replace(one, where=later) for one in self.interventions)

    @classmethod
    def of_rule(cls, rule: Rule, **rest: Any) -> Watch:
        """A rule of `classify fit`, asked of the tokens that counted when it was fitted.

        Raises:
            InputError: as the class, or a weighted rule.   FormatError: the rule says something else than which
                tokens counted.
        """
        if rule.weighted:
            raise InputError(f"the rule {rule.name!r} weighs whole documents; a watch asks every token: fit one by OR")
        features = tuple(sorted((one.layer, one.feature, float(one.threshold)) for one in rule.features))
        saes = tuple(sorted({(one.layer, one.sae) for one in rule.features}))
        return cls(**{"name": rule.name, "features": features, "counted": rule.counted, "saes": saes, **rest})

    @classmethod
    def from_json(cls, data: Any) -> Watch:
        """`{"name": "loops", "features": {"4/678": 1.5}, "where": "generated", "then": "stop"}`.

        In place of `features`, `rule` holds the object of a file of `classify fit`.

        Raises:
            FormatError, InputError: anything else.
        """
        found = Fields(data, "a watch", ("name",), _KEYS)
        rest: dict[str, Any] = {"name": found.text("name")}
        rest["where"] = Where.parse(found.text("where") if "where" in data else "generated")
        for key, read in (("then", found.text), ("times", found.count), ("recipe", found.text)):
            if (value := found.maybe(read, key)) is not None:
                rest[key] = value
        listed = found.maybe(found.items, "interventions") or []
        rest["interventions"] = tuple(Intervention.from_json(one) for one in listed)
        if ("rule" in data) == ("features" in data):
            raise InputError("a watch has `features` such as {'4/678': 1.5}, or the `rule` of a file of classify fit")
        if "rule" in data:
            if "counted" in data or "saes" in data:
                raise InputError("a watch with a `rule` has no `counted` and no `saes`: the rule says them")
            return cls.of_rule(Rule.from_json(found.object("rule"), f"the rule of the watch {rest['name']!r}"), **rest)
        thresholds = Fields(found.object("features"), "`features` of a watch")
        rest["features"] = tuple(sorted((*parse_feature(name), thresholds.number(name, 0)) for name in thresholds.data))
        if found.data.get("counted") is not None:
            rest["counted"] = Counted.from_json(found["counted"], "`counted` of a watch")
        given = Fields(found.maybe(found.object, "saes") or {}, "`saes` of a watch")
        rest["saes"] = tuple(sorted((_layer(name), given.text(name)) for name in given.data))
        return cls(**rest)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back."""
        data: dict[str, Any] = {
            "name": self.name,
            "features": {feature_name(layer, feature): threshold for layer, feature, threshold in self.features},
            "where": str(self.where),
            "then": self.then,
            "times": self.times,
        }
        if self.counted != Counted.everything():
            data["counted"] = self.counted.to_json()
        if self.saes:
            data["saes"] = {str(layer): fingerprint for layer, fingerprint in self.saes}
        if self.recipe is not None:
            data["recipe"] = self.recipe
        if self.interventions:
            data["interventions"] = [one.to_json() for one in self.interventions]
        return data


def check_watches(watches: Sequence[Watch]) -> None:
    """Refuse too many of them, or two of one name.

    Raises:
        InputError: as said.
    """
    if len(watches) > MOST_WATCHES:
        raise InputError(f"a request has at most {MOST_WATCHES} watches; got {len(watches)}")
    names = [one.name for one in watches]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two watches have the name {twice[0]!r}; names tell them apart in answers and metrics")


def check_fits(watch: Watch, layers: Sequence[int], saes: SAEsByLayer) -> None:
    """Refuse a watch that a server with these layers to read at could not evaluate.

    Raises:
        NotFoundError: a layer that is not read at, or a feature that does not exist.
        MismatchError: another SAE than the rule's.   InputError: a place of the switched recipe.
    """
    for layer, feature, _ in watch.features:
        if layer not in layers:
            listed = ", ".join(map(str, layers)) or "none"
            raise NotFoundError(f"layer {layer} is not served for reading; this server reads at: {listed}")
        if feature >= (count := saes[layer].d_sae):
            raise NotFoundError(f"feature {layer}/{feature} does not exist: the SAE has features 0 to {count - 1}")
    for layer, fingerprint in watch.saes:
        if layer in layers and (mine := saes[layer].identity.fingerprint) != fingerprint:
            raise MismatchError(
                f"the watch {watch.name!r} is about the SAE {fingerprint[:12]} of layer {layer}, not {mine[:12]}"
            )
    points = [str(HookPoint(layer)) for layer in watch.layers]
    if watch.counted.norms and (missing := [point for point in points if point not in watch.counted.norms]):
        raise NotFoundError(f"the watch {watch.name!r} has no threshold for sinks at {missing[0]}")


def read_watches(path: str | Path) -> tuple[Watch, ...]:
    """The file of `qwen-scope serve --watch`: `{"version": 1, "watch": [...]}`, or a rule of `classify fit`, whose
    alarms mark the answer.

    Raises:
        NotFoundError: there is none.   FormatError, InputError: it holds something else.
    """
    data: Mapping[str, Any] = read_object(path)
    if "features" in data and "format" in data:
        return (Watch.of_rule(Rule.from_json(data, f"the rule {path}"), where=Where.parse("generated")),)
    found = Fields(data, str(path), ("version", "watch"))
    found.header(VERSION)
    watches = tuple(Watch.from_json(one) for one in found.items("watch"))
    check_watches(watches)
    return watches


def _layer(name: str) -> int:
    if not name.isdecimal():
        raise FormatError(f"`saes` of a watch maps layers to fingerprints; {name[:60]!r} is no layer")
    return check_count("a layer", int(name), 0)

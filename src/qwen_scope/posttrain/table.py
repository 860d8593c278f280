"""The alpha table: which features an auxiliary loss holds down or up, and what they are elsewhere; a JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen_scope.errors import FormatError, MismatchError, NotFoundError
from qwen_scope.files import write_text
from qwen_scope.sae import SAE, Identity

FORMAT, VERSION = "qwen-scope alpha table", 1


@dataclass(frozen=True)
class LayerTable:
    """The chosen features of one layer.

    Attributes:
        layer: which, counting from 0.
        sae: the SAE whose features they are.
        features: their indices.
        scores: of each, what it was ranked by: its mean activation on the target less the mean of the other groups'
            means, or its effect on the first token of the target.
        alpha: per group the mean of each feature's pre-activations on that group's texts, or a quantile of them.
    """

    layer: int
    sae: Identity
    features: tuple[int, ...]
    scores: tuple[float, ...]
    alpha: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class AlphaTable:
    """Features of a target group, and their thresholds on every group.

    Attributes:
        target: the group the features belong to, such as a language or a style.
        layers: the features, layer by layer.
        tokens: ids that occur almost only in texts of the target; for the penalty on tokens.
        made: how the table was made: model, counts, how features were ranked and alpha set, versions.
    """

    target: str
    layers: tuple[LayerTable, ...]
    tokens: tuple[int, ...] = ()
    made: Mapping[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[str, ...]:
        """Every group, the target too, by name."""
        return tuple(sorted(self.layers[0].alpha))

    def layer(self, layer: int) -> LayerTable:
        """The features of one layer.

        Raises:
            NotFoundError: the table has none there.
        """
        for one in self.layers:
            if one.layer == layer:
                return one
        has = ", ".join(str(one.layer) for one in self.layers)
        raise NotFoundError(f"the alpha table has no features at layer {layer}; it has layers {has}")

    def check_sae(self, layer: int, sae: SAE) -> None:
        """Refuse an SAE other than the one the table was made with.

        Raises:
            MismatchError: another fingerprint or layer.
        """
        mine = self.layer(layer).sae
        if (mine.fingerprint, mine.layer) != (sae.identity.fingerprint, sae.identity.layer):
            raise MismatchError(
                f"the alpha table was made with {mine}, not with {sae.identity}; make one for this SAE with"
                " qwen-scope posttrain prepare"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON; the file appears complete or not at all."""
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_text(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n")


def read_table(path: str | os.PathLike[str]) -> AlphaTable:
    """The alpha table in a file.

    Raises:
        NotFoundError: there is no such file.   FormatError: it is not an alpha table of this version.
    """
    place = Path(path)
    if not place.is_file():
        raise NotFoundError(f"there is no alpha table {place}; make one with qwen-scope posttrain prepare")
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FormatError(f"{place} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(f"{place} is not an alpha table; make one with qwen-scope posttrain prepare")
    if data.get("version") != VERSION:
        raise FormatError(
            f"{place} is version {data.get('version')!r} of the alpha table; this package reads {VERSION}"
        )
    try:
        layers = tuple(_layer(entry) for entry in data["layers"])
        table = AlphaTable(str(data["target"]), layers, tuple(map(int, data["tokens"])), dict(data["made"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"the alpha table {place} is damaged: {type(error).__name__} {error}") from error
    _check(table, place)
    return table


def _layer(entry: Mapping[str, Any]) -> LayerTable:
    alpha = {str(group): tuple(map(float, values)) for group, values in entry["alpha"].items()}
    identity = Identity(str(entry["sae"]["group"]), entry["sae"]["layer"], str(entry["sae"]["fingerprint"]))
    features, scores = tuple(map(int, entry["features"])), tuple(map(float, entry["scores"]))
    return LayerTable(int(entry["layer"]), identity, features, scores, alpha)


def _check(table: AlphaTable, place: Path) -> None:
    if not table.layers:
        raise FormatError(f"the alpha table {place} has no layer")
    for one in table.layers:
        n = len(one.features)
        if not n or len(one.scores) != n or any(len(values) != n for values in one.alpha.values()):
            raise FormatError(f"layer {one.layer} of the alpha table {place} does not have one number per feature")
        if tuple(sorted(one.alpha)) != table.groups or table.target not in one.alpha:
            raise FormatError(f"layer {one.layer} of the alpha table {place} does not name the same groups as the rest")
        if not all(value == value and abs(value) != float("inf") for values in one.alpha.values() for value in values):
            raise FormatError(f"layer {one.layer} of the alpha table {place} holds a number that is not finite")

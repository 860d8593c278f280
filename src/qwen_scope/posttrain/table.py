"""The alpha table: which features an auxiliary loss holds down or up, and what they are elsewhere; a JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen_scope.errors import FormatError, MismatchError, NotFoundError
from qwen_scope.files import Fields, read_object, write_text
from qwen_scope.report import HasFrames, Table
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


@dataclass(frozen=True, repr=False)
class AlphaTable(HasFrames):
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

    def sheet(self) -> Table:
        """A row per feature, with its alpha on every group."""
        rows = [
            {
                "layer": here.layer,
                "feature": feature,
                "score": score,
                **{f"alpha_{g}": here.alpha[g][i] for g in self.groups},
            }
            for here in self.layers
            for i, (feature, score) in enumerate(zip(here.features, here.scores, strict=True))
        ]
        return Table.of(f"Features of {self.target}", rows)

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
    if not Path(path).exists():
        raise NotFoundError(f"there is no alpha table {path}; make one with qwen-scope posttrain prepare")
    one = Fields(read_object(path), f"the alpha table {path}")
    one.header(VERSION, FORMAT)
    one = Fields(one.data, one.what, ("format", "version", "target", "layers", "tokens", "made"))
    layers = tuple(_layer(entry, str(path)) for entry in one.items("layers"))
    table = AlphaTable(one.text("target"), layers, one.counts("tokens"), one.object("made"))
    _check(table, Path(path))
    return table


def _layer(entry: Any, path: str) -> LayerTable:
    one = Fields(entry, f"a layer of the alpha table {path}", ("layer", "sae", "features", "scores", "alpha"))
    alpha = Fields(one["alpha"], f"'alpha' of {one.what}")
    sae = Fields(one["sae"], f"'sae' of {one.what}", ("group", "layer", "fingerprint"))
    return LayerTable(
        one.count("layer"),
        Identity(sae.text("group"), sae.maybe(sae.count, "layer"), sae.text("fingerprint")),
        one.counts("features"),
        one.numbers("scores"),
        {group: alpha.numbers(group) for group in alpha.data},
    )


def _check(table: AlphaTable, place: Path) -> None:
    if not table.layers:
        raise FormatError(f"the alpha table {place} has no layer")
    if len({one.layer for one in table.layers}) < len(table.layers):
        raise FormatError(f"the alpha table {place} has a layer twice")
    for one in table.layers:
        n = len(one.features)
        if not n or len(one.scores) != n or any(len(values) != n for values in one.alpha.values()):
            raise FormatError(f"layer {one.layer} of the alpha table {place} does not have one number per feature")
        if one.sae.layer not in (None, one.layer):
            raise FormatError(f"layer {one.layer} of the alpha table {place} has the SAE of layer {one.sae.layer}")
        if len(set(one.features)) < n:
            raise FormatError(f"layer {one.layer} of the alpha table {place} names a feature twice")
        if tuple(sorted(one.alpha)) != table.groups or table.target not in one.alpha:
            raise FormatError(f"layer {one.layer} of the alpha table {place} does not name the same groups as the rest")

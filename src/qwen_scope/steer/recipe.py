"""`Recipe`: a named list of interventions that can be saved, shared and checked before it is applied."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError, foreign
from qwen_scope.files import (
    Fields,
    Remote,
    card_table,
    card_text,
    parse_value,
    place,
    push_folder,
    temporary_folder,
    write_text,
)
from qwen_scope.model import HookPoint, text_config
from qwen_scope.report import HasFrames, Table
from qwen_scope.sae import terms_of
from qwen_scope.text import Counted

from .intervention import Intervention
from .steering import SAEsByLayer

VERSION = 1
KINDS = (".json", ".yaml", ".yml")
MAX_BYTES = 64 * 10**6

_KEYS = {"version", "name", "model", "group", "interventions", "provenance", "effect"}


@runtime_checkable
class CountedByLayer(Protocol):
    """Anything that tells which tokens count at a layer as `counted[layer]`, such as `scope.counted`."""

    def __getitem__(self, layer: int, /) -> Counted: ...


@dataclass(frozen=True, repr=False)
class Recipe(HasFrames):
    """A named list of interventions.

    Attributes:
        name: what it is called.
        model: the signature of the model it was made on, from `signature`.
        interventions: what it does; those on features name their SAE.
        group: the group of SAEs that the features belong to, or None.
        provenance: how it was found, in words.
        effect: what it was measured to do: names to numbers or words.
        counted: by hook point, which tokens counted in the statistics that its units stand for; empty where it is not
            known or every amount is raw.

    Raises:
        InputError: no name or no intervention.
    """

    name: str
    model: str
    interventions: tuple[Intervention, ...]
    group: str | None = None
    provenance: str = ""
    effect: Mapping[str, Any] = field(default_factory=dict)
    counted: Mapping[str, Counted] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.interventions:
            raise InputError("a recipe has a name and at least one intervention")

    def sheet(self) -> Table:
        """A row per intervention."""
        return Table.of(self.name, [one.to_json() for one in self.interventions])

    @classmethod
    def of(
        cls,
        name: str,
        model: nn.Module,
        interventions: list[Intervention],
        saes: SAEsByLayer | None = None,
        *,
        provenance: str = "",
        effect: Mapping[str, Any] | None = None,
        counted: CountedByLayer | None = None,
    ) -> Recipe:
        """A recipe for this model, each feature bound to its SAE.

        Args:
            counted: which tokens count where `resid_norm` and `max_act` are measured, such as `scope.counted`.

        Raises:
            InputError, MismatchError: an intervention that does not fit its SAE.
        """
        bound = []
        for one in interventions:
            if one.feature is not None:
                if saes is None:
                    raise InputError(f"feature {one.feature} of layer {one.layer} needs its SAE")
                one = one.bound(saes[one.layer])
            bound.append(one)
        groups = {one.sae.group for one in bound if one.sae is not None}
        group = groups.pop() if len(groups) == 1 else None
        known = {}
        for one in bound:
            if counted is not None and one.needs_stats:
                here, at = counted[one.layer], str(one.hook_point)
                known[at] = replace(here, norms={at: here.norms[at]} if at in here.norms else {})
        return cls(name, signature(model), tuple(bound), group, provenance, dict(effect or {}), known)

    def differences(self, counted: CountedByLayer) -> list[str]:
        """Sentences on hook points where other tokens count than did when the amounts were chosen."""
        names = f"the recipe {self.name!r}", "this model"
        said = [one.difference(counted[HookPoint.parse(at).layer], names) for at, one in self.counted.items()]
        return list(dict.fromkeys(f"{one}; its amounts stand for other sizes" for one in said if one is not None))

    def check(self, model: nn.Module, saes: SAEsByLayer | None) -> None:
        """Refuse a model or SAEs that the recipe was not made for.

        Raises:
            MismatchError: another model or another SAE.
            InputError, NotFoundError: SAEs that are missing.
        """
        if signature(model) != self.model:
            raise MismatchError(
                f"the recipe {self.name!r} is for the model {self.model}, this one is {signature(model)}"
            )
        for one in self.interventions:
            if one.feature is not None:
                one.check(None if saes is None else saes[one.layer])

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in a file."""
        data = {
            "version": VERSION,
            "name": self.name,
            "model": self.model,
            "group": self.group,
            "provenance": self.provenance,
            "effect": dict(self.effect),
            "interventions": [one.to_json() for one in self.interventions],
        }
        if self.counted:
            data["counted"] = {at: one.to_json() for at, one in self.counted.items()}
        return data

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as `.json` or `.yaml`.

        Raises:
            InputError: another ending.
        """
        target, data = Path(path), self.to_json()
        _check_ending(target)
        if target.suffix == ".json":
            text = json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False)
        else:
            import yaml

            text = yaml.safe_dump(data, allow_unicode=True, sort_keys=False)
        write_text(target, text)

    def push_to_hub(self, repo: str, *, private: bool = False) -> str:
        """Send it as `recipe.yaml` to a repository of the Hub, with a card; the commit's address.

        Raises:
            InputError: no right to write there, or no token.
        """
        table = card_table(
            ("layer", "feature", "operation", "amount"),
            [(one.layer, one.feature, one.op, f"{one.amount:g} {one.unit}") for one in self.interventions],
        )
        parts = [f"Interventions on `{self.model}`, on SAEs of the group `{self.group}`.", table]
        parts += [self.provenance] if self.provenance else []
        parts += [f"Terms of use of the SAEs: {terms}."] if (terms := terms_of(self.group or "")) else []
        parts.append("```sh\nqwen-scope steer PROMPT --recipe recipe.yaml\n```")
        with temporary_folder() as folder:
            self.save(folder / "recipe.yaml")
            card = card_text(self.name, ["steering", "interpretability"], parts)
            return push_folder(folder, repo, "model", f"Recipe {self.name} by qwen-scope", private=private, card=card)


def load_recipe(path: str | os.PathLike[str], most_bytes: int = MAX_BYTES) -> Recipe:
    """Read a recipe.

    Args:
        most_bytes: of the file.

    Raises:
        NotFoundError: no such file.
        FormatError: not a recipe of this version, or too large.
        InputError: another ending than `.json` or `.yaml`, or interventions that mean nothing.
    """
    source = place(path)
    _check_ending(source)
    if not source.is_file():
        raise NotFoundError(f"there is no recipe {str(source)!r}")
    with foreign(f"{source.name} can't be read"), source.open("rb") as file:
        text = file.read(most_bytes + 1)
    if len(text) > most_bytes:
        raise FormatError(f"{source.name} is too large for a recipe: more than {most_bytes:,} bytes")
    data = parse_value(text, source.name, "JSON" if source.suffix == ".json" else "YAML")
    if not isinstance(data, dict):
        raise FormatError(f"{source.name} is not a recipe: it holds no keys")
    found = Fields(data, f"the recipe {source.name}")
    found.header(VERSION)
    found = Fields(data, found.what, sorted(_KEYS), ["counted"])
    made = tuple(Intervention.from_json(one) for one in found.items("interventions"))
    return Recipe(
        found.text("name"),
        found.text("model"),
        made,
        found.maybe(found.text, "group"),
        found.text("provenance"),
        found.object("effect"),
        {} if "counted" not in data else _counted(found.object("counted"), found.what),
    )


def _counted(known: Mapping[str, Any], what: str) -> dict[str, Counted]:
    return {
        str(HookPoint.parse(at)): Counted.from_json(one, f"'counted' at {at} in {what}") for at, one in known.items()
    }


def signature(model: nn.Module) -> str:
    """What tells models apart that a recipe can't be moved between: family and shape, not weights or name.

    Base and post-trained models of one size share it, because SAEs of the one are used on the other.
    """
    return signature_of(text_config(model))


def signature_of(config: Any) -> str:
    """The same from the config of the text decoder."""
    return f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}"


def _check_ending(path: Path | Remote) -> None:
    if path.suffix not in KINDS:
        raise InputError(f"a recipe ends in .json or .yaml, not {path.name!r}")

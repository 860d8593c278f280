"""The released groups of SAEs, Qwen's and the community's, and the bundled lab, as data."""

from __future__ import annotations

import functools
import importlib.resources
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_scope.errors import InputError, NotFoundError, nearest

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Group:
    """One released set of SAEs: one model, one width, one k, a file for each layer.

    Attributes:
        name: the repository's name without its owner, such as `SAE-Res-Qwen3-8B-Base-W64K-L0_50`.
        repo: the repository on the Hub, None for what travels inside the package.
        folder: where the files are if they travel inside the package, else None.
        model: the language model it was trained on: its Hub id, or the folder of the bundled one.
        kind: whether that model is a base or an instruct model.
        layers: how many decoder layers have an SAE.
        d_sae: 0 where it is not known.
        k: active features per token; of a JumpReLU SAE what it was trained for, on average.
        aliases: other names it is known by, such as the release name in sae_lens.
        which: the layers, counted from 0; empty where they are the first `layers` ones.
        complete: whether the repository holds no further layers.
        by: who released it.
        layout: the layout of its files.
        path: the weights file, with `{layer}` in the place of the layer; None where the names are not known.
        config: the file beside it, None where there is none.
        folder_on_hub: the folder of the repository that its files are in.
        stored: the type of the released matrices, None where it is not known.
        conventions: how it reads a residual, and what is folded into the weights when it is loaded.
    """

    name: str
    repo: str | None
    folder: Path | None
    model: str
    kind: Literal["base", "instruct"]
    layers: int
    d_model: int
    d_sae: int
    k: int
    hook_point: str = "resid_post"
    aliases: tuple[str, ...] = ()
    which: tuple[int, ...] = ()
    complete: bool = True
    by: str = "Qwen"
    architecture: str = "topk"
    layout: str = "official"
    path: str | None = "layer{layer}.sae.pt"
    config: str | None = "config.json"
    folder_on_hub: str = ""
    stored: str | None = "float32"
    conventions: str = "top-k; reads x itself, b_dec is only added; layers count from 0"

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The layers that are known to have an SAE, counted from 0."""
        return self.which or tuple(range(self.layers))

    def filename(self, layer: int) -> str:
        """The weights file of a layer.

        Raises:
            NotFoundError: a layer this group does not have, or files whose names are not known.
        """
        if layer not in self.layer_numbers:
            has = (
                f"it has {_listed(self.layer_numbers)}" if self.complete else f"known are {_listed(self.layer_numbers)}"
            )
            raise NotFoundError(f"{self.name} has no SAE for layer {layer}; {has}")
        if self.path is None:
            raise NotFoundError(f"the names of the files of {self.name} are not known here")
        return self.path.replace("{layer}", str(layer))

    def filenames(self) -> list[str]:
        """The weights files and configs of the layers that are known, none where their names are not."""
        if self.path is None:
            return []
        found = [self.filename(layer) for layer in self.layer_numbers]
        beside = [self.config.replace("{layer}", str(layer)) for layer in self.layer_numbers] if self.config else []
        return [*dict.fromkeys(beside), *found]

    def bytes_per_layer(self, dtype: object = "float32") -> int:
        """Bytes of one SAE whose matrices are stored in `dtype` (a name or a torch dtype); vectors stay fp32.

        Raises:
            InputError: not one of float32, bfloat16 and float16, or a group whose width is not known.
        """
        name = str(dtype).removeprefix("torch.")
        if not self.d_sae:
            raise InputError(f"the width of {self.name} is not known here")
        if name not in DTYPE_BYTES:
            raise InputError(f"weights are stored as {', '.join(DTYPE_BYTES)}, not {name}")
        return 2 * self.d_sae * self.d_model * DTYPE_BYTES[name] + 4 * (self.d_sae + self.d_model)

    def total_bytes(self, dtype: object = "float32") -> int:
        """Bytes of all layers."""
        return self.layers * self.bytes_per_layer(dtype)


def groups() -> tuple[Group, ...]:
    """The groups of Qwen-Scope: first the bundled lab if this installation has it, then the released ones."""
    return (*_bundled(), *_released())


@functools.cache
def community() -> tuple[Group, ...]:
    """The groups that others released for Qwen models: their layouts were checked, their weights were not."""
    found = []
    for row in _rows()["community"]:
        shared = {key: value for key, value in row.items() if key != "parts"}
        for part in row.get("parts", [{}]):
            said = {"name": row["repo"].rpartition("/")[2], "d_sae": 0, "stored": None, **shared, **part}
            label = said.pop("part", "")
            for key, absent in (("path", None), ("config", None), ("folder_on_hub", "")):
                said[key] = said[key].replace("{part}", label) if key in said else absent
            layers = tuple(said.pop("layers"))
            found.append(Group(folder=None, layers=len(layers), which=layers, **said))
    return tuple(found)


def find(name: str) -> Group:
    """The group of that name: Hub id, repository name or alias, in any case of letters.

    Raises:
        NotFoundError: no such group; the message names the nearest.   InputError: a repository of several groups.
    """
    group = lookup(name)
    if group is None:
        everyone = (*groups(), *community())
        known = [known for group in everyone for known in (group.name, *group.aliases)]
        if parts := [group.name for group in everyone if name.strip().lower() in _names(group)]:
            raise InputError(f"{name} holds several groups of SAEs; name one: {', '.join(parts)}")
        if name.lower() in {row["name"] for row in _rows()["bundled"]}:
            raise NotFoundError(f"this installation lacks the bundled {name.lower()}; `qwen-scope lab build` makes it")
        raise NotFoundError(f"there is no group {name!r} in the catalog; {nearest(name.rpartition('/')[2], known)}")
    return group


def lookup(name: str) -> Group | None:
    """The group of that name, or None; also for the id of a repository that holds several groups."""
    found = [group for group in (*groups(), *community()) if name.strip().lower() in _names(group)]
    return found[0] if len(found) == 1 else None


def _names(group: Group) -> set[str]:
    return {known.lower() for known in (group.name, group.repo or group.name, *group.aliases)}


def _listed(layers: Sequence[int]) -> str:
    """The layers as a phrase, a run from 0 shortened."""
    if len(layers) > 2 and tuple(layers) == tuple(range(len(layers))):
        return f"layers 0 to {layers[-1]}"
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}" if layers else "none"


@functools.cache
def _rows() -> dict[str, list[dict[str, Any]]]:
    return tomllib.loads(
        importlib.resources.files("qwen_scope.sae").joinpath("catalog.toml").read_text(encoding="utf-8")
    )


@functools.cache
def _released() -> tuple[Group, ...]:
    found = []
    for row in _rows()["group"]:
        row = dict(row)
        aliases = (row.pop("release"),)
        found.append(Group(name=row["repo"].rpartition("/")[2], folder=None, aliases=aliases, **row))
    return tuple(found)


def _bundled() -> tuple[Group, ...]:
    """What travels inside the package, read from its own config; a lab that is not there is left out."""
    root = Path(str(importlib.resources.files("qwen_scope")))
    found = []
    for row in _rows()["bundled"]:
        folder = root / row["folder"]
        if not (folder / "config.json").is_file():
            continue
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found.append(
            Group(
                name=config["group"],
                repo=None,
                folder=folder,
                model=str(root / row["model"]),
                kind="base",
                layers=sum(1 for _ in folder.glob("layer*.sae.*")),
                d_model=config["d_model"],
                d_sae=config["d_sae"],
                k=config["k"],
                aliases=(row["name"],),
            )
        )
    return tuple(found)

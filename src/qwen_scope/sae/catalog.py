"""The released groups of SAEs and the bundled lab, as data."""

from __future__ import annotations

import functools
import importlib.resources
import json
import tomllib
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
        layers: how many decoder layers have an SAE; they count from 0.
        aliases: other names it is known by, such as the release name in sae_lens.
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

    def filename(self, layer: int) -> str:
        """The weights file of a layer; raises NotFoundError for a layer this group does not have."""
        if not 0 <= layer < self.layers:
            raise NotFoundError(f"{self.name} has no SAE for layer {layer}; it has layers 0 to {self.layers - 1}")
        return f"layer{layer}.sae.pt"

    def bytes_per_layer(self, dtype: object = "float32") -> int:
        """Bytes of one SAE whose matrices are stored in `dtype` (a name or a torch dtype); vectors stay fp32.

        Raises:
            InputError: not one of float32, bfloat16 and float16.
        """
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPE_BYTES:
            raise InputError(f"weights are stored as {', '.join(DTYPE_BYTES)}, not {name}")
        return 2 * self.d_sae * self.d_model * DTYPE_BYTES[name] + 4 * (self.d_sae + self.d_model)

    def total_bytes(self, dtype: object = "float32") -> int:
        """Bytes of all layers."""
        return self.layers * self.bytes_per_layer(dtype)


def groups() -> tuple[Group, ...]:
    """Every group: first the bundled lab if this installation has it, then the released ones."""
    return (*_bundled(), *_released())


def find(name: str) -> Group:
    """The group of that name: Hub id, repository name or alias, in any case of letters.

    Raises:
        NotFoundError: no such group; the message names the nearest.
    """
    group = lookup(name)
    if group is None:
        known = [known for group in groups() for known in (group.name, *group.aliases)]
        if name.lower() in {row["name"] for row in _rows()["bundled"]}:
            raise NotFoundError(f"this installation lacks the bundled {name.lower()}; `qwen-scope lab build` makes it")
        raise NotFoundError(f"there is no group {name!r} in the catalog; {nearest(name.rpartition('/')[2], known)}")
    return group


def lookup(name: str) -> Group | None:
    """The group of that name, or None."""
    wanted = name.strip().lower()
    for group in groups():
        if wanted in {known.lower() for known in (group.name, group.repo or group.name, *group.aliases)}:
            return group
    return None


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

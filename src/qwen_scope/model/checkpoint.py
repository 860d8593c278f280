"""The tensors of a checkpoint in safetensors: their headers at once, their values when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import errors as hub
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from torch import Tensor

from qwen_scope.errors import FormatError, NotFoundError, foreign

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read or computed whenever it is indexed, as transformers does for each while it loads.

    Attributes:
        make: gives its values.
        kind: its type as safetensors writes it, such as `F8_E4M3`.
        shape: of its values.
    """

    make: Callable[[], Tensor]
    kind: str
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> Tensor:
        return self.make()[index]


def read_checkpoint(name: str, place: str, revision: str | None) -> dict[str, Lazy]:
    """The tensors of a model in a folder or on the Hub, by name; none where it has no safetensors.

    Args:
        name: what messages call the model.   place: the folder, or the repository.

    Raises:
        NotFoundError: a file that the index names is not there.   FormatError: a file that can't be read.
    """
    fetch = _in_folder(place) if Path(place).is_dir() else _on_hub(name, place, revision)
    tensors: dict[str, Lazy] = {}
    with foreign(f"the weights of {name!r} can't be loaded"):
        for file in _files(name, fetch):
            held = safe_open(file, framework="pt")
            for key in held.keys():  # noqa: SIM118  # no mapping
                part = held.get_slice(key)
                tensors[key] = Lazy(
                    lambda held=held, key=key: held.get_tensor(key), part.get_dtype(), (*part.get_shape(),)
                )
    return tensors


def _files(name: str, fetch: Callable[[str], Path | None]) -> list[Path]:
    if (single := fetch(SINGLE)) is not None:
        return [single]
    if (index := fetch(INDEX)) is None:
        return []
    where = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    if not isinstance(where, Mapping) or not all(isinstance(part, str) for part in where.values()):
        raise FormatError(f"the {INDEX} of {name!r} does not say which file holds which tensor")
    files = {part: fetch(part) for part in sorted(set(where.values()))}
    if missing := [part for part, path in files.items() if path is None]:
        raise NotFoundError(f"{name!r} lacks {len(missing)} of its {len(files)} files of weights, such as {missing[0]}")
    return [path for path in files.values() if path is not None]


def _in_folder(folder: str) -> Callable[[str], Path | None]:
    def fetch(file: str) -> Path | None:
        path = Path(folder, Path(file).name)  # an index can't name a file elsewhere
        return path if path.is_file() else None

    return fetch


def _on_hub(name: str, repo: str, revision: str | None) -> Callable[[str], Path | None]:
    def fetch(file: str) -> Path | None:
        with foreign(f"{file} of {name!r} can't be fetched", NotFoundError):
            try:
                return Path(hf_hub_download(repo, file, revision=revision))
            except (hub.EntryNotFoundError, hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
                return None

    return fetch

"""What features of a scope are called: by the labels that lie beside its SAEs, or by those of a store or a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from qwen_scope.errors import MismatchError
from qwen_scope.sae import catalog
from qwen_scope.scope import Scope

from .label_entry import Label
from .notes import labels_from

BESIDE = "labels.jsonl"
"""The file of a folder of SAEs that holds their labels, as `label --export` writes it."""

Labels = Callable[[int, int], Label | None]
"""By layer and feature its label; None where it has none."""


def labels_of(scope: Scope, path: str | os.PathLike[str] | None = None) -> Labels:
    """The labels of a scope's features.

    Args:
        path: a store, or a file that `label --export` wrote; by default the file beside the SAEs, if there is one.

    Raises:
        NotFoundError, FormatError: there are no labels at that path, or their file is damaged.
        MismatchError: none of the labels at that path is about an SAE of this scope.
    """
    source = beside(scope) if path is None else Path(path)
    if source is None:
        return lambda layer, feature: None
    known = labels_from(source)

    @cache
    def fingerprint(layer: int) -> str:
        return scope.saes[layer].identity.fingerprint

    if path is not None and known and not {one for one, _ in known} & {fingerprint(layer) for layer in scope.layers}:
        raise MismatchError(f"no label in {path} is about an SAE of {scope.saes.source}; name labels of these SAEs")
    return lambda layer, feature: known.get((fingerprint(layer), feature))


def names_of(scope: Scope, path: str | os.PathLike[str] | None = None) -> Callable[[int, int], str]:
    """The same as texts with their scores, "" where a feature has no label; see `labels_of`."""
    labels = labels_of(scope, path)

    def name(layer: int, feature: int) -> str:
        label = labels(layer, feature)
        return "" if label is None else f"{label.shown} ({label.score:.2f})"

    return name


def beside(scope: Scope) -> Path | None:
    """The file of labels in the folder of a scope's SAEs, where that is on this disk and has one."""
    listed = catalog.lookup(scope.saes.source)
    folder = Path(scope.saes.source) if listed is None else listed.folder
    file = None if folder is None else folder / BESIDE
    return file if file is not None and file.is_file() else None

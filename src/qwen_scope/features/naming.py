"""What features of a scope are called: by the labels that lie beside its SAEs, or by those of a store or a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from qwen_scope.errors import MismatchError, NotFoundError
from qwen_scope.sae import catalog, load_sae
from qwen_scope.scope import Scope
from qwen_scope.store import FeatureStore

from .label_entry import Label
from .notes import Notes, labels_from

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
    source = beside(scope.saes.source) if path is None else Path(path)
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

    return lambda layer, feature: said(labels(layer, feature))


def labels_of_store(store: FeatureStore) -> dict[tuple[int, int], Label]:
    """The labels of a store's features by layer and feature: its own, and where it has none those that lie beside the
    SAEs it was made with."""
    own = Notes(store).labels()
    try:
        source = store.source("saes") or next(iter(store.manifest.layers.values())).group
    except NotFoundError:  # the SAEs have moved; the store has what it needs without them
        source = ""
    file = beside(source)
    layers = {info.fingerprint: layer for layer, info in store.manifest.layers.items()}
    known = {} if file is None else labels_from(file)
    return {(layers[sae], feature): one for (sae, feature), one in known.items() if sae in layers} | own


def label_of(
    layer: int, feature: int, *, scope: Scope | None = None, store: FeatureStore | None = None
) -> Label | None:
    """The label of one feature: the store's own, else that which lies beside the SAEs; None where there is neither."""
    own = None if store is None else Notes(store).label(layer, feature)
    if own is not None:
        return own
    found = None if scope is None else labels_of(scope)(layer, feature)
    return found if found is not None or store is None else labels_of_store(store).get((layer, feature))


def names_of_store(store: FeatureStore) -> Callable[[int, int], str]:
    """What features of a store are called; see `labels_of_store`."""
    known = labels_of_store(store)
    return lambda layer, feature: said(known.get((layer, feature)))


def names_of_saes(source: str) -> Callable[[int, int], str]:
    """What features of SAEs are called, by the labels beside them; nothing has a name where there is no such file.

    Args:
        source: a group of the catalog, a folder or a file, as `load_sae` takes it.
    """
    file = beside(source)
    if file is None:
        return lambda layer, feature: ""
    known = labels_from(file)

    @cache
    def fingerprint(layer: int) -> str:
        return load_sae(source, layer).identity.fingerprint

    return lambda layer, feature: said(known.get((fingerprint(layer), feature)))


def said(label: Label | None) -> str:
    """A label as it stands beside a number, with its score; "" for none."""
    return "" if label is None else f"{label.shown} ({label.score:.2f})"


def beside(source: str) -> Path | None:
    """The file of labels in a folder of SAEs or beside the file of one, where that is on this disk and has one."""
    listed = catalog.lookup(source)
    folder = Path(source) if listed is None else listed.folder
    if folder is not None and folder.is_file():
        folder = folder.parent
    file = None if folder is None else folder / BESIDE
    return file if file is not None and file.is_file() else None

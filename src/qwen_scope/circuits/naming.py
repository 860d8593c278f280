"""What features of a graph are called, where labels of their SAEs exist."""

from __future__ import annotations

import os
from collections.abc import Callable

from qwen_scope.errors import MismatchError
from qwen_scope.features import labels_from
from qwen_scope.scope import Scope


def names_from(scope: Scope, path: str | os.PathLike[str]) -> Callable[[int, int], str]:
    """By layer and feature a label with its score, from a store or an exported file; "" where there is none.

    Raises:
        NotFoundError, FormatError: there are no labels, or their file is damaged.
        MismatchError: none of them is about an SAE of this scope.
    """
    known = labels_from(path)
    fingerprints = {layer: scope.saes[layer].identity.fingerprint for layer in scope.layers}
    if known and not {fingerprint for fingerprint, _ in known} & set(fingerprints.values()):
        raise MismatchError(f"no label in {path} is about an SAE of {scope.saes.source}; name labels of these SAEs")

    def name(layer: int, feature: int) -> str:
        label = known.get((fingerprints[layer], feature))
        return "" if label is None else f"{label.shown} ({label.score:.2f})"

    return name

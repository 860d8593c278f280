"""Documents by their metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from qwen_scope.errors import NotFoundError, nearest
from qwen_scope.files import Remote

Condition = tuple[str, str, bool]
"""A column of the documents' metadata, a value, and whether they are to be equal."""


def meeting(
    metas: Sequence[Mapping[str, Any]], conditions: Sequence[Condition], folder: Path | Remote
) -> Int64[np.ndarray, " documents"]:
    """The documents whose metadata meet every condition, ascending; see `FeatureStore.where`.

    Raises:
        NotFoundError: no document has such a column.
    """
    for column, _, _ in conditions:
        if not any(column in meta for meta in metas):
            known = sorted({name for meta in metas for name in meta})
            raise NotFoundError(f"no document of {folder} has a column {column!r}; {nearest(column, known)}")
    keep = [all((_plain_text(meta.get(c)) == v) is equal for c, v, equal in conditions) for meta in metas]
    return np.flatnonzero(keep).astype(np.int64)


def _plain_text(value: Any) -> str | None:
    return value if isinstance(value, str) or value is None else json.dumps(value, ensure_ascii=False)

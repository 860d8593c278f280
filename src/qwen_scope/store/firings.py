"""`Firings`: documents as analyses take them, read out of a store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from qwen_scope.errors import InputError
from qwen_scope.text import Counted

from .layout import LayerInfo
from .store import FeatureStore

NOTHING_COUNTS = "no token that counts"


@dataclass(frozen=True, eq=False)
class Firings:
    """What fires on each of some documents, and their mean residuals: of the tokens that count, nothing else.

    Attributes:
        name: of the documents.
        rows: the row of each in its source, from 1.
        metas: their metadata.   texts: what they read.   tokens: what each token of each shows.
        table: the `Firing` table under `max`; its documents are numbered as here.
        residuals: by layer the mean residual of each document.
        layers: by layer the SAE that was used.
        counted: which tokens count.
        left_out: how many documents could not be used, by reason.
    """

    name: str
    rows: tuple[int, ...]
    metas: tuple[dict[str, Any], ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    table: pa.Table
    residuals: Mapping[int, Float32[np.ndarray, "documents d_model"]]
    layers: Mapping[int, LayerInfo]
    counted: Counted
    left_out: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, store: FeatureStore, name: str, features: Mapping[int, Sequence[int]] | None = None) -> Firings:
        """All documents of a store with mean residuals; those without a token that counts are left out and counted.

        Args:
            features: only these of each layer; None for all.

        Raises:
            InputError: no token of any document counts.   NotFoundError: a store without mean residuals.
        """
        if not any(store.layer(layer).tokens for layer in store.layers):
            raise InputError(f"no document of {name} has a token that counts; --count all counts every token")
        residuals = {layer: store.residuals(layer, "mean") for layer in store.layers}
        keep = np.flatnonzero(np.all([np.isfinite(x).all(1) for x in residuals.values()], axis=0))
        number = np.full(store.manifest.documents, -1, np.int32)
        number[keep] = np.arange(len(keep), dtype=np.int32)
        parts = [
            store.firing("max", [layer], features=None if features is None else features[layer])
            for layer in store.layers
        ]
        table = pa.concat_tables(parts)
        document = number[table["document"].to_numpy()]
        table = table.set_column(0, "document", pa.array(document)).filter(pa.array(document >= 0))
        about = store.sql("SELECT row, meta FROM documents ORDER BY document").take(pa.array(keep))
        shown = store.sql(
            "SELECT list(text ORDER BY position) AS texts FROM tokens GROUP BY document ORDER BY document"
        )["texts"].to_pylist()
        tokens = tuple(tuple(shown[i]) for i in keep.tolist())
        left_out = Counter(store.manifest.unreadable)
        if missing := store.manifest.documents - len(keep):
            left_out[NOTHING_COUNTS] = missing
        return cls(
            name,
            tuple(about["row"].to_pylist()),
            tuple(json.loads(text) for text in about["meta"].to_pylist()),
            tuple("".join(some) for some in tokens),
            tokens,
            table,
            {layer: x[keep] for layer, x in residuals.items()},
            store.manifest.layers,
            store.manifest.counted or Counted.everything(),
            dict(left_out),
        )

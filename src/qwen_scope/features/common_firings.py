"""What two dictionaries find on the same tokens, read from stores of the same documents."""

from __future__ import annotations

import numpy as np
import torch

from qwen_scope.errors import MismatchError
from qwen_scope.sae import FeatureActs
from qwen_scope.store import FeatureStore


def common_firings(
    a: FeatureStore, layer: int, b: FeatureStore, other_layer: int, tokens: int | None = None
) -> tuple[FeatureActs, FeatureActs]:
    """The activations of a layer of two stores, or of two layers of one, on the tokens that count at both.

    Args:
        tokens: at most this many, from the beginning; None for all.

    Raises:
        MismatchError: the stores are of different tokens.   NotFoundError: a store has no such layer.
    """
    for store, which in ((a, layer), (b, other_layer)):
        store.layer(which)
    total = a.manifest.tokens if tokens is None else min(tokens, a.manifest.tokens)
    check_same_documents(a, b, total)
    counts = counting(a, layer, total) & counting(b, other_layer, total)
    return activations(a, layer, counts), activations(b, other_layer, counts)


def check_same_documents(a: FeatureStore, b: FeatureStore, tokens: int) -> None:
    """Raise MismatchError unless the first `tokens` tokens of two stores are the same, in the same documents."""
    if a.folder.resolve() == b.folder.resolve():
        return
    first = [(one.manifest.tokens, one.manifest.documents) for one in (a, b)]
    same = first[0] == first[1]
    if same:
        columns = ["document", "position", "token"]
        left, right = (one.tables["tokens"].read(0, tokens, columns) for one in (a, b))
        same = left.equals(right)
    if not same:
        raise MismatchError(
            f"{a.folder} and {b.folder} hold other tokens: co-firing needs the same documents, so extract both from one"
            " corpus with the same options"
        )


def counting(store: FeatureStore, layer: int, tokens: int) -> np.ndarray:
    """Which of the first tokens of a store count at a layer."""
    counts = np.ones(tokens, bool)
    masked = store.sql("SELECT document, position FROM masked WHERE layer = ?", [layer])
    rows = token_rows(store, masked["document"].to_numpy(), masked["position"].to_numpy())
    counts[rows[rows < tokens]] = False
    return counts


def activations(store: FeatureStore, layer: int, counts: np.ndarray) -> FeatureActs:
    """The activations of a layer on the tokens that `counts` names, in order."""
    at, feature, value = [], [], []
    last = store.tables["tokens"].read(len(counts) - 1, 1, ["document"])["document"][0].as_py()
    query = "SELECT document, position, feature, value FROM activations WHERE layer = ? AND document <= ?"
    for batch in store.stream(query, [layer, last]):
        document, position, some, values = (column.to_numpy() for column in batch.columns)
        rows = token_rows(store, document, position)
        here = rows < len(counts)
        here[here] = counts[rows[here]]
        at.append(rows[here])
        feature.append(some[here])
        value.append(values[here])
    rows = np.concatenate([np.zeros(0, np.int64), *at])
    features = np.concatenate([np.zeros(0, np.int32), *feature])
    values = np.concatenate([np.zeros(0, np.float32), *value])
    order = np.lexsort((features, -values, rows))
    features, values, row = features[order], values[order], (np.cumsum(counts) - 1)[rows[order]]
    slots = np.arange(len(row)) - np.searchsorted(row, row)
    shape = (int(counts.sum()), int(slots.max()) + 1 if len(slots) else 0)
    indices, strengths = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    indices[row, slots], strengths[row, slots] = features, values
    return FeatureActs(torch.from_numpy(indices), torch.from_numpy(strengths), store.layer(layer).d_sae)


def token_rows(store: FeatureStore, document: np.ndarray, position: np.ndarray) -> np.ndarray:
    """The rows of places in the table of tokens."""
    first = store.tables["documents"].read(0, store.tables["documents"].rows, ["first_token"])["first_token"].to_numpy()
    return first[document].astype(np.int64) + position

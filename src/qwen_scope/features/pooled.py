"""Documents as features: per document and feature the largest activation, the sum, and on how many tokens it fires."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int64
from scipy import sparse

from qwen_scope.errors import InputError
from qwen_scope.report import Progress
from qwen_scope.scope import Layers, Scope, Texts, as_texts
from qwen_scope.store import FeatureStore
from qwen_scope.text import REASONS, Chat

REDUCTIONS = ("max", "mean")

# Texts that go through the model at once.
TEXTS = 64


@dataclass(frozen=True, eq=False)
class Pooled:
    """The features of some documents at one layer; what does not fire is not kept.

    Attributes:
        layer: which.   width: how many features the dictionary has.
        tokens: `(documents,)` how many tokens of each document count.
        maximum, total, fires: `(documents, width)` sparse by column: the largest activation, the sum over tokens, and
            on how many tokens the feature fires.
        left_out: how many tokens of all documents count, and how many do not for each of `qwen_scope.text.REASONS`;
            empty where it is not known.
    """

    layer: int
    width: int
    tokens: Int64[np.ndarray, " documents"]
    maximum: sparse.csc_array
    total: sparse.csc_array
    fires: sparse.csc_array
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        """How many."""
        return len(self.tokens)

    def firing(self) -> Int64[np.ndarray, " firing"]:
        """The features that fire in at least one document, ascending."""
        return np.flatnonzero(np.diff(self.maximum.indptr)).astype(np.int64)

    def values(
        self, reduction: str, features: Int64[np.ndarray, " features"] | Sequence[int]
    ) -> Float32[np.ndarray, "documents features"]:
        """The activation of some features over each document: its `max` or its `mean` over the tokens that count."""
        if reduction not in REDUCTIONS:
            raise InputError(f"a document is reduced by {' or '.join(REDUCTIONS)}, not {reduction!r}")
        chosen = np.asarray(features, np.int64)
        if reduction == "max":
            return self.maximum[:, chosen].toarray().astype(np.float32)
        return (self.total[:, chosen].toarray() / np.maximum(1, self.tokens)[:, None]).astype(np.float32)

    def rows(self, documents: Int64[np.ndarray, " some"]) -> Pooled:
        """Only some of the documents, in the order given."""
        maximum, total, fires = (
            sparse.csc_array(table.tocsr()[documents]) for table in (self.maximum, self.total, self.fires)
        )
        return Pooled(self.layer, self.width, self.tokens[documents], maximum, total, fires)


def pool_texts(
    scope: Scope,
    texts: Texts,
    layers: Layers = None,
    *,
    chat: Chat | None = None,
    progress: Progress | None = None,
) -> dict[int, Pooled]:
    """The features of texts over their tokens that count, by layer, straight from the model.

    A text longer than the context is cut. Which tokens count is told by `scope.counted`.

    Args:
        chat: render the texts, a conversation among them, with the chat template, in this mode.
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        InputError: no text, or an empty one.   NotFoundError: a layer without an SAE.
    """
    wanted, texts = scope.check_layers(layers), as_texts(texts)
    tokens: dict[int, list[int]] = {layer: [] for layer in wanted}
    left_out: dict[int, dict[str, int]] = {layer: dict.fromkeys(REASONS, 0) for layer in wanted}
    parts: dict[int, list[tuple[np.ndarray, ...]]] = {layer: [] for layer in wanted}
    for start in range(0, max(1, len(texts)), TEXTS):
        seen = scope.features(texts[start : start + TEXTS], wanted, chat=chat, truncate=True)
        for layer in wanted:
            acts, counts = seen.acts[layer], (seen.reasons[layer] == 0).numpy()
            tokens[layer] += counts.sum(1).tolist()
            for reason, count in seen.tally(layer).items():
                left_out[layer][reason] += count
            indices, values = acts.indices.numpy(), acts.values.float().numpy()
            on = (values > 0) & counts[..., None]
            row = np.broadcast_to(np.arange(len(counts))[:, None, None], on.shape)[on] + start
            parts[layer].append(_grouped(row, indices[on], values[on], scope.saes[layer].d_sae))
        if progress is not None:
            progress("reading", (start + len(seen.texts)) / len(texts), "")
    return {
        layer: _pooled(layer, scope.saes[layer].d_sae, tokens[layer], found, left_out[layer])
        for layer, found in parts.items()
    }


def pool_store(
    store: FeatureStore,
    documents: Sequence[int] | Int64[np.ndarray, " n"],
    layers: Sequence[int] | None = None,
    phases: Sequence[str] | None = None,
) -> dict[int, Pooled]:
    """The features of documents of a store, by layer; masked tokens do not count.

    Args:
        phases: only tokens of these phases of a conversation.

    Raises:
        InputError: no document, or an unknown phase.
        NotFoundError: a document or layer the store does not have, or phases of a store that tells none.
    """
    chosen = [int(document) for document in documents]
    if not chosen:
        raise InputError("there is no document to look at")
    for edge in (min(chosen), max(chosen)):
        store.check_document(edge)
    named = [] if phases is None else store.check_phases(phases)
    wanted = (
        "wanted AS (SELECT unnest($documents::INTEGER[]) AS document), inside AS (SELECT document, position AS start,"
        " position + tokens AS stop FROM spans WHERE list_contains($phases::VARCHAR[], phase))"
    )
    sized = (
        "documents"
        if phases is None
        else "(SELECT document, sum(stop - start)::BIGINT AS tokens FROM inside GROUP BY ALL)"
    )

    def some(table: str) -> str:
        """The rows of a table that are of the phases."""
        if phases is None:
            return table
        return (
            f"(SELECT t.* FROM {table} t JOIN inside ON t.document = inside.document"
            " AND t.position >= inside.start AND t.position < inside.stop)"
        )

    out = {}
    for layer in store.layers if layers is None else layers:
        width = store.layer(layer).d_sae
        params = {"layer": layer, "documents": chosen, "phases": named}
        counted = store.sql(
            f"WITH {wanted}, gone AS"
            f" (SELECT document, count(*) AS masked FROM {some('masked')} WHERE layer = $layer GROUP BY document)"
            f" SELECT document, tokens - coalesce(masked, 0) AS tokens FROM {sized} SEMI JOIN wanted USING (document)"
            " LEFT JOIN gone USING (document)",
            params,
        )
        found = store.stream(
            f"WITH {wanted} SELECT document, feature, max(value) AS top, sum(value::DOUBLE) AS total, count(*) AS fires"
            f" FROM (SELECT * FROM {some('activations')} WHERE layer = $layer) SEMI JOIN wanted USING (document)"
            " GROUP BY document, feature",
            params,
        )
        sizes = dict(zip(counted["document"].to_pylist(), counted["tokens"].to_pylist(), strict=True))
        place = np.full(store.manifest.documents, -1, np.int64)
        place[chosen] = np.arange(len(chosen))
        parts = [
            (
                place[batch["document"].to_numpy()],
                *(batch[name].to_numpy() for name in ("feature", "top", "total", "fires")),
            )
            for batch in found
        ]
        out[layer] = _pooled(layer, width, [sizes.get(document, 0) for document in chosen], parts)
    return out


def together(parts: Sequence[Mapping[int, Pooled]]) -> dict[int, Pooled]:
    """The documents of several groups, one after the other."""
    out = {}
    for layer in parts[0]:
        some = [part[layer] for part in parts]
        maximum, total, fires = (
            sparse.csc_array(sparse.vstack([getattr(one, name) for one in some]))
            for name in ("maximum", "total", "fires")
        )
        tokens = np.concatenate([one.tokens for one in some])
        out[layer] = Pooled(layer, some[0].width, tokens, maximum, total, fires, added(one.left_out for one in some))
    return out


def added(left_out: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Tallies of several groups of tokens as one; of none where one of them is not known."""
    parts = list(left_out)
    return {reason: sum(part[reason] for part in parts) for reason in REASONS} if parts and all(parts) else {}


def _grouped(row: np.ndarray, feature: np.ndarray, value: np.ndarray, width: int) -> tuple[np.ndarray, ...]:
    """Activations token by token to one line per document and feature."""
    key = row.astype(np.int64) * width + feature
    order = np.argsort(key, kind="stable")
    key, value = key[order], value[order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    if not len(first):
        return key, key, value, value.astype(np.float64), key
    counts = np.diff(np.append(first, len(key)))
    top, total = np.maximum.reduceat(value, first), np.add.reduceat(value.astype(np.float64), first)
    return key[first] // width, key[first] % width, top, total, counts


def _pooled(
    layer: int,
    width: int,
    tokens: Sequence[int],
    parts: Iterable[tuple[np.ndarray, ...]],
    left_out: Mapping[str, int] | None = None,
) -> Pooled:
    found = list(parts)
    if found:
        row, feature, top, total, fires = (np.concatenate(column) for column in zip(*found, strict=True))
    else:
        row = feature = top = total = fires = np.zeros(0, np.int64)
    where, shape = (row, feature), (len(tokens), width)
    tables = [sparse.csc_array(sparse.coo_array((values, where), shape=shape)) for values in (top, total, fires)]
    return Pooled(layer, width, np.asarray(tokens, np.int64), *tables, left_out=left_out or {})

"""Features that rise while a text repeats itself: the last repeat of a token against its first occurrence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from scipy import sparse, stats

from qwen_scope.errors import InputError, check_count
from qwen_scope.sae import FeatureActs
from qwen_scope.scope import Layers, Scope, Texts
from qwen_scope.stats import Interval, benjamini_hochberg, bootstrap
from qwen_scope.store import FeatureStore
from qwen_scope.text import Chat

from .pooled import TEXTS

FEWEST = 5


@dataclass(frozen=True, eq=False)
class Changes:
    """Per document how much each feature changes from the first occurrence of a token to its last.

    Attributes:
        layer, width: of the dictionary.
        mean: `(documents, width)` sparse: activation at the last occurrence less that at the first, mean over the
            tokens that repeat in the document.
        tokens: `(documents,)` how many such tokens there are; documents without any are left out.
    """

    layer: int
    width: int
    mean: sparse.csc_array
    tokens: Int64[np.ndarray, " documents"]


@dataclass(frozen=True)
class RepeatFeature:
    """A feature that rises with repetition.

    Attributes:
        layer, feature: which.
        rise: mean over documents of its change from first to last occurrence, with a bootstrap interval.
        p: of the signed-rank test over documents.   q: adjusted over every feature and layer.
        significant: q is at or below the level and the feature rises.
    """

    layer: int
    feature: int
    rise: Interval
    p: float
    q: float
    significant: bool


def repeats_in_texts(
    scope: Scope,
    texts: Texts,
    layers: Layers = None,
    *,
    times: int = 2,
    chat: Chat | None = None,
) -> dict[int, Changes]:
    """The changes in texts, by layer, straight from the model; only tokens that count are compared.

    A sink is no first occurrence, since features of its residual say nothing of its token.

    Args:
        texts: with `chat` also conversations.
        times: how often a token has to occur in a text among those that count.
        chat: render the texts with the chat template, in this mode.

    Raises:
        InputError: no text, an empty one, or none in which a token occurs so often.
    """
    wanted = scope.check_layers(layers)
    parts: dict[int, list[sparse.csr_array]] = {layer: [] for layer in wanted}
    tokens: dict[int, list[int]] = {layer: [] for layer in wanted}
    for start in range(0, max(1, len(texts)), TEXTS):
        seen = scope.features(texts[start : start + TEXTS], wanted, chat=chat, truncate=True)
        for text in range(len(seen.texts)):
            ids = seen.input_ids[text][: len(seen.tokens[text])].numpy()
            for layer in wanted:
                places = np.flatnonzero(seen.counts(text, layer).numpy())
                first, last = (places[some].tolist() for some in pairs_of(ids[places], times))
                if not first:
                    continue
                tokens[layer].append(len(first))
                acts = seen.of(text, layer)
                width = scope.saes[layer].d_sae
                parts[layer].append(row_of(acts, last, width) - row_of(acts, first, width))
    for layer in wanted:
        check_repeats(tokens[layer], times)
    return {
        layer: Changes(layer, scope.saes[layer].d_sae, sparse.csc_array(sparse.vstack(rows)), np.array(tokens[layer]))
        for layer, rows in parts.items()
    }


def repeats_in_store(
    store: FeatureStore,
    layers: Sequence[int] | None = None,
    *,
    documents: Sequence[int] | None = None,
    times: int = 2,
) -> dict[int, Changes]:
    """The same from the documents of a store; masked tokens do not count.

    Raises:
        InputError: no token occurs so often in a document.   NotFoundError: a layer the store does not have.
    """
    out = {}
    for layer in store.layers if layers is None else layers:
        width = store.layer(layer).d_sae
        chosen = list(range(store.manifest.documents)) if documents is None else [int(d) for d in documents]
        pairs = """WITH wanted AS (SELECT unnest($documents::INTEGER[]) AS document),
            gone AS (SELECT document, position FROM masked WHERE layer = $layer),
            pairs AS (SELECT document, min(position) AS first, max(position) AS last
              FROM tokens SEMI JOIN wanted USING (document) ANTI JOIN gone USING (document, position)
              GROUP BY document, token HAVING count(*) >= $times)"""
        params = {"documents": chosen, "layer": layer, "times": times}
        counts = store.sql(
            f"{pairs} SELECT document, count(*) AS n FROM pairs GROUP BY document ORDER BY document", params
        )
        kept, tokens = counts["document"].to_numpy(), counts["n"].to_numpy().astype(np.int64)
        check_repeats(tokens.tolist(), times)
        found = store.sql(
            f"""{pairs}, ends AS (SELECT document, last AS position, 1.0 AS side FROM pairs
              UNION ALL SELECT document, first, -1.0 FROM pairs)
            SELECT document, feature, sum(value::DOUBLE * side) AS change
            FROM (SELECT * FROM activations WHERE layer = $layer) JOIN ends USING (document, position)
            GROUP BY document, feature""",
            params,
        )
        row = np.searchsorted(kept, found["document"].to_numpy())
        change = found["change"].to_numpy() / tokens[row]
        where = row, found["feature"].to_numpy()
        table = sparse.csc_array(sparse.coo_array((change, where), shape=(len(kept), width)))
        out[layer] = Changes(layer, width, table, tokens)
    return out


def repeat_features(changes: Mapping[int, Changes], n: int = 10, *, level: float = 0.01) -> list[RepeatFeature]:
    """The features that rise most from first occurrence to last repeat, over all layers, largest rise first.

    The token is the same both times, so what it is cannot explain the change; what stands around it can. The measure is
    the report's for endless repetition (arXiv 2605.11887, section 8); test and adjustment are added here.

    Raises:
        InputError: fewer than five documents with a repeated token.
    """
    check_count("n", n)
    if not 0 < level < 1:
        raise InputError(f"a false discovery rate lies between 0 and 1, not at {level}")
    scored = []
    for layer, found in sorted(changes.items()):
        if (documents := len(found.tokens)) < FEWEST:
            raise InputError(f"{documents} documents with repeated tokens are too few; {FEWEST} is the least")
        features = np.flatnonzero(np.diff(found.mean.indptr)).astype(np.int64)
        dense = found.mean[:, features].toarray()
        scored.append((layer, features, signed_rank_test(dense), dense))
    tests = sum(found.width for found in changes.values())
    q = benjamini_hochberg(np.concatenate([p for _, _, p, _ in scored]), tests)
    rises = np.concatenate([dense.mean(0) for *_, dense in scored])
    places = [(i, j) for i, (_, features, _, _) in enumerate(scored) for j in range(len(features))]
    out = []
    believed = (q[: len(rises)] <= level) & (rises > 0)
    ranked = np.argsort(-rises, kind="stable")
    for at in ranked[:n].tolist():
        i, j = places[at]
        layer, features, p, dense = scored[i]
        rise = bootstrap(dense[:, j])
        out.append(RepeatFeature(layer, int(features[j]), rise, float(p[j]), float(q[at]), bool(believed[at])))
    return out


def signed_rank_test(changes: Float64[np.ndarray, "documents features"]) -> Float64[np.ndarray, " features"]:
    """Per column the two-sided p-value of Wilcoxon's signed-rank test; zeros count for both sides."""
    if not changes.shape[1]:
        return np.zeros(0)
    found: Any = stats.wilcoxon(changes, axis=0, zero_method="zsplit", method="asymptotic")
    return np.nan_to_num(np.asarray(found.pvalue, np.float64), nan=1.0)


def pairs_of(ids: np.ndarray, times: int) -> tuple[list[int], list[int]]:
    """First and last position of every id that occurs at least `times` times."""
    _, first, counts = np.unique(ids, return_index=True, return_counts=True)
    _, last = np.unique(ids[::-1], return_index=True)
    often = counts >= times
    return first[often].tolist(), (len(ids) - 1 - last[often]).tolist()


def row_of(acts: FeatureActs, tokens: list[int], width: int) -> sparse.csr_array:
    """Mean activation of every feature over some tokens of a text: `(1, width)`."""
    indices, values = acts.indices[tokens].numpy(), acts.values[tokens].double().numpy()
    total = np.bincount(indices.ravel(), values.ravel(), minlength=width)
    return sparse.csr_array(total[None] / len(tokens))


def check_repeats(tokens: Sequence[int], times: int) -> None:
    """Refuse texts that repeat nothing."""
    if times < 2:
        raise InputError(f"a token repeats if it occurs at least twice, not {times} times")
    if not tokens:
        raise InputError(f"no token occurs {times} times in any of these texts")

"""Labelled documents as `classify` needs them: firings, residuals and labels."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    import numpy as np

    from qwen_scope.analysis import Dataset, Labelled
    from qwen_scope.scope import Scope
    from qwen_scope.text import Chat, Corpus, CorpusOptions


def read_documents(
    scope: Scope, source: str, layers: list[int], reading: CorpusOptions, bar: Any
) -> tuple[dict[int, Dataset], dict[int, np.ndarray]]:
    """Firings by `max` and mean residuals of every document of a source."""
    return read_corpus(scope, options.read(source, reading), name_of(source), layers, bar, reading.chat)[:2]


def name_of(source: str) -> str:
    """What a set of documents is called where nobody says it: a file's name without its ending."""
    return source if source.startswith("lab:") else Path(source.removesuffix(".gz")).stem


def read_corpus(
    scope: Scope, corpus: Corpus, name: str, layers: list[int], bar: Any, chat: Chat | None = None
) -> tuple[dict[int, Dataset], dict[int, np.ndarray], list[dict[str, Any]]]:
    """Firings by `max`, mean residuals and metadata of every document, by way of a store in a temporary folder."""
    from qwen_scope.analysis import Dataset
    from qwen_scope.model import LoadedModel
    from qwen_scope.scope import ExtractOptions, extract
    from qwen_scope.text import tell_unused

    loaded = LoadedModel(scope.model, scope.tokenizer, scope.name)
    saes = {layer: scope.saes[layer] for layer in layers}
    with tempfile.TemporaryDirectory(prefix="qwen-scope-") as folder:
        chosen = ExtractOptions(pool=("mean",), chat=chat)
        report = lambda now: bar(corpus.name, now.share or 0.0, f"{now.tokens:,} tokens")  # noqa: E731
        with extract(corpus, loaded, saes, Path(folder) / "store", chosen, report) as store:
            found = {layer: Dataset.from_store(store, layer, "max", name=name, texts=True) for layer in layers}
            metas = store.sql("SELECT meta FROM documents ORDER BY document")["meta"].to_pylist()
            pooled = {layer: store.residuals(layer, "mean") for layer in layers}
            unused = store.manifest.unreadable
            tell_unused(unused, len(metas) + sum(unused.values()), corpus.name)
            return found, pooled, [json.loads(meta) for meta in metas]


def labelled(read: list[Any], layers: list[int]) -> tuple[Labelled, dict[int, np.ndarray]]:
    """Positive and negative documents as one set with labels, and their residuals."""
    import numpy as np

    from qwen_scope.analysis import Labelled, joined

    (positive, x), (negative, y) = read
    n, m = (len(next(iter(side.values()))) for side in (positive, negative))
    together = {
        layer: joined("seeds", [positive[layer], renamed(negative[layer], positive[layer].name)]) for layer in layers
    }
    labels = np.array([True] * n + [False] * m)
    return Labelled(together, labels), {layer: np.concatenate([x[layer], y[layer]]) for layer in layers}


def renamed(data: Dataset, taken: str) -> Dataset:
    """The dataset under a name that is not taken, so that ids stay apart."""
    from dataclasses import replace

    return replace(data, name=data.name + "-negative") if data.name == taken else data

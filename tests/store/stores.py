"""A small corpus, the tiny model and its SAEs, and the activations computed directly: what a store is held against."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np
import tiny

from qwen_scope.model import LoadedModel
from qwen_scope.sae import SAE
from qwen_scope.scope import ExtractOptions, Scope, extract, load_scope
from qwen_scope.store import FeatureStore
from qwen_scope.text import Corpus, Counted

LAYERS = (0, 2)
TEXTS = [text * n for n in (1, 3, 2) for text in tiny.TEXTS] + ["hello hello hello", "x"]
ROWS = [{"text": text, "n": i, "language": "de" if "Bahnhof" in text else "xx"} for i, text in enumerate(TEXTS)]
ROW_TOKENS = 40


@functools.cache
def scope() -> Scope:
    return load_scope(tiny.folder() / "model", tiny.folder() / "sae", device="cpu")


def loaded() -> LoadedModel:
    return LoadedModel(scope().model, scope().tokenizer, "tiny")


def saes() -> dict[int, SAE]:
    return {layer: scope().saes[layer] for layer in LAYERS}


def make(folder: Path, rows: list | None = None, **options) -> FeatureStore:
    """The store of the small corpus: windows of about 100 tokens, documents in pieces of 40; every token counts."""
    chosen = {
        "row_tokens": ROW_TOKENS,
        "window_tokens": 100,
        "batch_tokens": 80,
        "counted": Counted.everything(),
        **options,
    }
    return extract(Corpus(ROWS if rows is None else rows), loaded(), saes(), folder, ExtractOptions(**chosen))


def dense(layer: int, row_tokens: int = ROW_TOKENS) -> list[np.ndarray]:
    """Per document `(tokens, d_sae)`, each piece of a document through the scope on its own."""
    tokenizer, found = scope().tokenizer, []
    for text in TEXTS:
        import torch

        from qwen_scope.model import HookPoint, capture

        ids = tokenizer(text)["input_ids"]
        pieces = [torch.tensor([ids[i : i + row_tokens]]) for i in range(0, len(ids), row_tokens)]
        h = [capture(scope().model, piece, [HookPoint(layer)])[HookPoint(layer)][0] for piece in pieces]
        found.append(np.concatenate([scope().saes[layer].encode(some).to_dense().numpy() for some in h]))
    return found


def from_store(store: FeatureStore, layer: int) -> list[np.ndarray]:
    """Per document `(tokens, d_sae)`, read back with SQL."""
    width = store.layer(layer).d_sae
    lengths = store.sql("SELECT tokens FROM documents ORDER BY document")["tokens"].to_pylist()
    out = [np.zeros((length, width), np.float32) for length in lengths]
    for row in store.sql("SELECT * FROM activations WHERE layer = ?", [layer]).to_pylist():
        assert out[row["document"]][row["position"], row["feature"]] == 0
        out[row["document"]][row["position"], row["feature"]] = row["value"]
    return out


def digest(folder: Path) -> dict[str, str]:
    """Every file of a folder with its checksum."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

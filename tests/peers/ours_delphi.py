"""Our side of the check against delphi: `python ours_delphi.py WORK` leaves a latents folder and what it must hold."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from qwen_scope import load_scope
from qwen_scope.features import export_delphi
from qwen_scope.lab import documents
from qwen_scope.model import LoadedModel
from qwen_scope.scope import extract
from qwen_scope.text import Corpus

LAYER, CONTEXT, WIDTH = 0, 32, 40

work = Path(sys.argv[1])
scope = load_scope("lab", device="cpu")
corpus = Corpus([d.text for d in documents(seed=1, n=12)], name="peers")
loaded = LoadedModel(scope.model, scope.tokenizer, "lab")
with extract(corpus, loaded, {LAYER: scope.saes[LAYER]}, work / "store") as store:
    export_delphi(store, work / "latents", layers=[LAYER], context=CONTEXT, splits=4)
    rows = store.manifest.tokens // CONTEXT
    first = store.sql("SELECT first_token FROM documents ORDER BY document")["first_token"].to_numpy()
    tokens = store.sql("SELECT token FROM tokens ORDER BY document, position")["token"].to_numpy()
    expected = {"tokens": tokens[: rows * CONTEXT].reshape(rows, CONTEXT), "features": np.arange(WIDTH)}
    for feature in range(WIDTH):
        query = "SELECT document, position, value FROM activations WHERE layer = ? AND feature = ? ORDER BY ALL"
        found = store.sql(query, [LAYER, feature])
        place = first[found["document"].to_numpy()] + found["position"].to_numpy()
        inside = place < rows * CONTEXT
        expected[f"locations_{feature}"] = np.stack([place // CONTEXT, place % CONTEXT], 1)[inside]
        expected[f"activations_{feature}"] = found["value"].to_numpy()[inside].astype(np.float16)
    np.savez(work / "expected.npz", **expected)

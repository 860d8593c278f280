"""Write texts for features that a corpus lacks, and keep those in which the features fire.

The writer here knows only the lab's grammar; any OpenAI-compatible address takes its place.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from qwen_scope import load_scope
from qwen_scope.features import Endpoint
from qwen_scope.lab import documents
from qwen_scope.model import LoadedModel
from qwen_scope.posttrain import SynthesisOptions, listed_targets, serving_lab, synthesize
from qwen_scope.scope import extract
from qwen_scope.text import Corpus

LAYER = 5
scope = load_scope("lab", device="cpu")
folder = Path(tempfile.mkdtemp())

# A corpus that shows what the features react to, and a small one in English to complete.
shown = Corpus([{"text": d.text} for d in documents(seed=1, n=100, kinds=["talk"])], name="shown")
english = Corpus([{"text": d.text} for d in documents(seed=2, n=20, kinds=["talk"], languages=["en"])], name="english")

model = LoadedModel(scope.model, scope.tokenizer, scope.name)
with extract(shown, model, {LAYER: scope.saes[LAYER]}, folder / "shown") as store:
    # A few features that fire in some of these texts; they count where they are as strong as in their top tenth.
    often = np.argsort(-store.stats(LAYER)["documents"].to_numpy(), kind="stable")
    targets = listed_targets(store, [(LAYER, int(i)) for i in often[200:500:30]], strength=0.9)

with serving_lab() as server:
    endpoint = Endpoint(server.url, "lab", concurrency=4)
    options = SynthesisOptions(budget=30, batch=8)
    found = synthesize(scope, english, targets, endpoint, folder / "run", options)

print(f"{found['coverage_before']:.0%} of {found['targets']} targets fire in the corpus, {found['coverage']:.0%} now")
print(f"after {found['answers']} answers: {found['outcomes']}")
for line in (folder / "run" / "data.jsonl").read_text(encoding="utf-8").splitlines()[:2]:
    row = json.loads(line)
    print(f"\nfeature {row['feature']} ({row['label']}), {row['activation']:.1f}:\n{row['text'][:150]}")

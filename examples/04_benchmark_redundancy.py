"""How redundant are two sets of prompts? Extract their features, ask, and keep the few items that matter."""

import tempfile
from pathlib import Path

from qwen_scope import load_scope
from qwen_scope.analysis import Dataset, greedy, redundancy_of
from qwen_scope.model import LoadedModel
from qwen_scope.scope import extract
from qwen_scope.text import Corpus

FOODS = ("bread", "rice", "fish", "cheese", "honey", "cake", "butter", "salad")
PROMPTS = {
    "one pattern": [f"Do you want some {food}?" for food in FOODS],
    "all sorts": [
        "Where is the station?",
        "Wo ist der Bahnhof?",
        "车站在哪里？",
        "12 + 30 = ",
        "def f(x):\n    return",
        "Shut up, you fool!",
        "Verily, the fox slumbereth.",
        "- bread\n- rice\n",
    ],
}

scope = load_scope("lab")
loaded = LoadedModel(scope.model, scope.tokenizer, "lab")
with tempfile.TemporaryDirectory() as folder:
    datasets = []
    for name, prompts in PROMPTS.items():
        with extract(Corpus(prompts), loaded, {4: scope.saes[4]}, Path(folder) / name) as store:
            datasets.append(Dataset.from_store(store, 4, "last", name=name, texts=True))

for name, found in redundancy_of(datasets).data.items():
    print(f"{name}: R-hat {found['redundancy']:.3f}, {found['footprint']} features on {found['items']} prompts")
for data in datasets:
    chosen, _ = greedy(data, share=0.7)
    print(f"70% of the footprint of {data.name}:", *(repr((data.texts or data.ids)[i]) for i in chosen))

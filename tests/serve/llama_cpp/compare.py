"""The same GGUF, steered by a control vector in llama.cpp and by its recipe in the toolkit.

    compare.py ENV MODEL.gguf SAE [--layers 6,18] [--amount 0.4]

Ten prompts, 16 greedy tokens. The recipe adds one feature of each layer and a random direction between them. It holds
if the greedy tokens are the same for at least nine prompts, or if the mean absolute difference of the log-probabilities
of the toolkit's own tokens is within the 95% interval, over prompts, of that difference without steering. Beside it,
the same vectors one layer early and one layer late.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from qwen_scope import Intervention, load_scope
from qwen_scope.steer import Decoding, Row, control_vector, log_probabilities, write_control_vector

PROMPTS = [
    "The capital of France is", "Once upon a time there was a", "To make a good soup you need", "Water boils when",
    "def mean(values):\n", "The committee met on Tuesday to", "My favourite book is", "In 1969 the first",
    "The difference between a cat and a dog is", "Dear Sir or Madam,\n",
]  # fmt: skip
STEPS = 16


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("env", type=Path)
    asked.add_argument("model")
    asked.add_argument("sae")
    asked.add_argument("--layers", default="6,18")
    asked.add_argument("--amount", type=float, default=0.4)
    given = asked.parse_args()
    scope = load_scope(given.model, given.sae, device="cpu", dtype="float32")
    recipe = recipe_of(scope, [int(layer) for layer in given.layers.split(",")], given.amount)
    vectors = control_vector(scope.model, recipe, scope.saes, scope.stats)
    ids = [scope.tokenize([prompt]).input_ids[0].tolist() for prompt in PROMPTS]
    ours = {name: toolkit(scope, ids, some) for name, some in (("unsteered", []), ("steered", recipe))}
    with tempfile.TemporaryDirectory() as folder:
        shifts = {"steered": 0, "one layer early": -1, "one layer late": 1}
        theirs = {"unsteered": llama(given, "", ids, ours["unsteered"], folder)}
        for name, shift in shifts.items():
            path = f"{folder}/{shift}.gguf"
            write_control_vector({layer + shift: one for layer, one in vectors.items()}, path)
            theirs[name] = llama(given, path, ids, ours["steered"], folder)
    figures = {name: compared(ours["unsteered" if name == "unsteered" else "steered"], theirs[name]) for name in theirs}
    within = figures["steered"]["mean"] <= figures["unsteered"]["interval"][1]
    holds = figures["steered"]["same"] >= 9 or within
    changed = sum(a["text"] != b["text"] for a, b in zip(ours["unsteered"], ours["steered"], strict=True))
    print(json.dumps({"model": Path(given.model).name, "changed": changed, **figures, "holds": holds}, indent=2))
    raise SystemExit(not holds)


def recipe_of(scope, layers: list[int], amount: float) -> list[Intervention]:
    """At each layer the feature that fires most often on the built-in sample, and a random direction in between."""
    chosen = []
    for layer in layers:
        rate = scope.stats[layer].firing_rate
        chosen.append(Intervention.add(layer=layer, feature=int(rate.argmax()), amount=amount, unit="resid_norm"))
    middle = torch.randn(scope.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    between = (layers[0] + layers[-1]) // 2
    scale = 0.25 * scope.stats[layers[0]].norm_median / float(middle.norm())
    return [*chosen, Intervention.add(layer=between, direction=middle * scale, amount=1.0)]


def toolkit(scope, ids: list[list[int]], recipe: list[Intervention]) -> list[dict]:
    """Per prompt its greedy continuation of `STEPS` tokens and their log-probabilities."""
    rows = []
    for prompt, one in zip(PROMPTS, ids, strict=True):
        made = scope.generate(prompt, recipe, decoding=Decoding(max_new_tokens=STEPS))
        text = [token.token_id for token in made.tokens]
        scored = log_probabilities(scope.model, [Row((*one, *text), len(one))], recipe, scope.saes, scope.stats)[0]
        rows.append({"text": text, "log_probabilities": scored.tolist()})
    return rows


def llama(given, vector: str, ids: list[list[int]], ours: list[dict], folder: str) -> list[dict]:
    """The same prompts in llama.cpp, and the log-probabilities it gives the toolkit's tokens."""
    request = {
        "shim": str(given.env / "shim.so"), "model": given.model, "vector": vector, "context": 256,
        "answer": f"{folder}/answer.json",
        "rows": [{"prompt": one, "text": row["text"]} for one, row in zip(ids, ours, strict=True)],
    }  # fmt: skip
    script = Path(__file__).with_name("llama.py")
    subprocess.run([given.env / "bin/python", script], input=json.dumps(request), text=True, check=True,
                   capture_output=True)  # fmt: skip
    return json.loads(Path(request["answer"]).read_text())


def compared(ours: list[dict], theirs: list[dict]) -> dict:
    """How many prompts have the same greedy tokens, and the difference of log-probabilities in nats."""
    each = [
        np.abs(np.subtract(a["log_probabilities"], b["log_probabilities"])) for a, b in zip(ours, theirs, strict=True)
    ]
    of_prompt = np.array([one.mean() for one in each])
    drawn = np.random.default_rng(0).choice(of_prompt, (10_000, len(of_prompt))).mean(-1)
    return {
        "same": sum(a["text"] == b["greedy"] for a, b in zip(ours, theirs, strict=True)),
        "mean": float(of_prompt.mean()),
        "interval": np.quantile(drawn, [0.025, 0.975]).tolist(),
        "largest": float(max(one.max() for one in each)),
    }


main()

"""The same GGUF, steered by a control vector in llama.cpp and by its recipe in the toolkit.

    compare.py ENV MODEL.gguf SAE [--layers 6,18] [--amount 0.4]

The recipe adds one feature of each layer and a random direction between them. Two criteria, one of which has to hold:

- the greedy tokens of ten prompts, 16 each, are the same for at least nine;
- log-probabilities of the same tokens differ no more between the two programs with the recipe than without it. The
  tokens are those of two texts for each of 32 prompts, the toolkit's greedy continuation without the recipe and that
  with it, and both are read in both arms: what a program writes itself is probable to it, and differences are small
  there, so neither arm may have more of its own text. It holds if the median and the 90% quantile of the
  differences under the recipe are at most the upper ends of their 95% intervals without (bootstrap over prompts).

Beside it, the same vectors one layer early and one layer late, which have to miss.
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
    "The train was late because", "She opened the letter and", "A triangle has three", "The recipe calls for two",
    "When the storm ended, the sailors", "According to the report, sales", "for i in range(10):\n", "The moon is about",
    "He asked the teacher whether", "Plants need light to", "The museum is closed on", "In the north of Italy",
    "Our neighbours have bought", "The patient was told to take", "Many birds fly south in", "import numpy as np\n",
    "It is important to remember that", "The river flows through", "A good friend is someone who",
    "The company was founded in", "Between the two world wars", "The answer to your question is",
]  # fmt: skip
GREEDY = 10
"""Prompts of the first criterion."""

STEPS = 16
LEVELS = (0.5, 0.9)
ARMS = {"unsteered": None, "steered": 0, "one layer early": -1, "one layer late": 1}
"""By name how far the vectors are moved; None without any."""


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
    texts = [written(scope, []), written(scope, recipe)]  # without and with
    rows = [(i, text) for made in texts for i, text in enumerate(made)]
    scored = [Row((*ids[i], *text), len(ids[i])) for i, text in rows]
    ours = {name: log_probabilities(scope.model, scored, recipe if name != "unsteered" else [], scope.saes, scope.stats)
            for name in ("unsteered", "steered")}  # fmt: skip
    figures, drawn = {}, np.random.default_rng(0).integers(0, len(PROMPTS), (2000, len(PROMPTS)))
    with tempfile.TemporaryDirectory() as folder:
        for name, shift in ARMS.items():
            path = "" if shift is None else f"{folder}/{shift}.gguf"
            if shift is not None:
                write_control_vector({layer + shift: one for layer, one in vectors.items()}, path)
            own = len(PROMPTS) * (shift is not None)  # whose greedy tokens are compared
            greedy = range(own, own + GREEDY)
            asks = [{"prompt": ids[i], "text": text, "greedy": j in greedy} for j, (i, text) in enumerate(rows)]
            theirs = llama(given, path, asks, folder)
            mine = ours["unsteered" if shift is None else "steered"]
            apart = [np.abs(a - np.array(b["log_probabilities"])) for a, b in zip(mine, theirs, strict=True)]
            by_prompt = [np.concatenate([apart[i], apart[i + len(PROMPTS)]]) for i in range(len(PROMPTS))]
            same = sum(theirs[j]["greedy"] == list(rows[j][1]) for j in greedy)
            figures[name] = {"same": same, **quantiles(by_prompt, drawn)}
    plain = figures["unsteered"]
    for name in figures:
        within = all(figures[name][str(level)][0] <= plain[str(level)][2] for level in LEVELS)
        figures[name]["holds"] = figures[name]["same"] >= GREEDY - 1 or within
    changed = sum(a != b for a, b in zip(*texts, strict=True))
    tokens = sum(len(text) for _, text in rows)
    print(json.dumps({"model": Path(given.model).name, "changed": changed, "tokens": tokens, **figures}, indent=1))
    good = figures["steered"]["holds"] and not any(figures[name]["holds"] for name in list(ARMS)[2:])
    raise SystemExit(not good)


def quantiles(by_prompt: list[np.ndarray], drawn: np.ndarray) -> dict[str, list[float]]:
    """Of the differences, in nats: each quantile with its 95% interval over prompts."""
    found = {}
    for level in LEVELS:
        again = [np.quantile(np.concatenate([by_prompt[i] for i in draw]), level) for draw in drawn]
        ends = np.quantile(again, [0.025, 0.975]).tolist()
        found[str(level)] = [round(float(x), 5) for x in (np.quantile(np.concatenate(by_prompt), level), *ends)]
    return found


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


def written(scope, recipe: list[Intervention]) -> list[tuple[int, ...]]:
    """The greedy continuation of each prompt."""
    made = scope.generate(PROMPTS, recipe, decoding=Decoding(max_new_tokens=STEPS))
    return [tuple(token.token_id for token in one.tokens) for one in made]


def llama(given, vector: str, rows: list[dict], folder: str) -> list[dict]:
    """The same in llama.cpp: log-probabilities of each text, and the greedy continuations that were asked for."""
    request = {"shim": str(given.env / "shim.so"), "model": given.model, "vector": vector, "context": 256,
               "answer": f"{folder}/answer.json", "rows": rows}  # fmt: skip
    script = Path(__file__).with_name("llama.py")
    subprocess.run([given.env / "bin/python", script], input=json.dumps(request), text=True, check=True,
                   capture_output=True)  # fmt: skip
    return json.loads(Path(request["answer"]).read_text())


main()

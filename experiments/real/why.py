"""Graphs of features on a real model: the measures of the lab's experiments, as they come out.

    python -m experiments.real.why --models FOLDER --saes FOLDER [--write]

Prompts whose answer is known stand below, in five kinds; the quantity is the logit of the answer less that of another
token that would fit if the fact were another. A prompt whose quantity is not above 0, or whose words are no single
tokens, is left out and counted. Nothing of this is a pass or a failure; what is measured, fixed before the run:

1. Pearson and Spearman correlation with exact ablation of the 50 features with the largest estimates, by method;
2. the share of prompts in which ablating the 5 features with the largest positive effects lowers the quantity more
   than each of 20 sets of matched features (same layer, nearest in activation and firing rate), ranked by the method
   with the highest median Pearson correlation on the first prompt of each kind, which is left out of all figures;
3. the number of features with which half the faithfulness is reached (zero ablation, errors kept), ranked by method
   `joint`, by that method and by activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.graphs import (
    MATCHED,
    STRONGEST,
    TOP,
    activations,
    agreement,
    estimates,
    half,
    matched,
    median_ratio,
    median_size,
)
from experiments.harness import At, Experiment, Row, main
from experiments.sections import paragraph, table
from qwen_scope import load_scope
from qwen_scope.circuits import Quantity, effects, one_token, read
from qwen_scope.errors import InputError
from qwen_scope.scope import Scope

TITLE = "Why this token, on a real model"
METHODS = ("gradient", "relp")
PROMPTS: dict[str, list[tuple[str, str, str]]] = {
    "capital": [
        (f"The capital of {country} is", f" {city}", f" {other}")
        for country, city, other in (
            ("France", "Paris", "London"), ("Italy", "Rome", "Paris"), ("Japan", "Tokyo", "Beijing"),
            ("Germany", "Berlin", "Paris"), ("Spain", "Madrid", "Rome"), ("England", "London", "Paris"),
            ("China", "Beijing", "Tokyo"), ("Egypt", "Cairo", "Rome"),
        )
    ],
    "opposite": [
        (f"The opposite of {word} is", f" {answer}", f" {other}")
        for word, answer, other in (
            ("hot", "cold", "small"), ("big", "small", "cold"), ("up", "down", "out"), ("good", "bad", "old"),
            ("young", "old", "bad"), ("left", "right", "down"), ("fast", "slow", "low"), ("high", "low", "slow"),
        )
    ],
    "number": [
        (f"The {noun} near the {other}", f" {verb}", f" {wrong}")
        for noun, other, verb, wrong in (
            ("keys", "cabinet", "are", "is"), ("boy", "trees", "is", "are"), ("dogs", "house", "are", "is"),
            ("teacher", "students", "is", "are"), ("cars", "building", "are", "is"), ("girl", "doors", "is", "are"),
            ("houses", "river", "are", "is"), ("city", "mountains", "is", "are"),
        )
    ],
    "pronoun": [
        (f"The {who} opened the door, because", f" {answer}", f" {other}")
        for who, answer, other in (
            ("queen", "she", "he"), ("king", "he", "she"), ("girl", "she", "he"), ("boy", "he", "she"),
            ("mother", "she", "he"), ("father", "he", "she"), ("woman", "she", "he"), ("man", "he", "she"),
        )
    ],
    "next": [
        (given, answer, other)
        for given, answer, other in (
            ("Monday, Tuesday,", " Wednesday", " Sunday"), ("January, February,", " March", " June"),
            ("Thursday, Friday,", " Saturday", " Tuesday"), ("one, two, three,", " four", " six"),
            ("first, second,", " third", " fifth"), ("A, B, C,", " D", " G"), ("spring, summer,", " autumn", " winter"),
            ("June, July,", " August", " March"),
        )
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Prompts of each part of a kind; the very first chooses the method."""

    prompts: int = 4


@cache
def opened(model: str, saes: Path) -> Scope:
    """The model with its SAEs, in float32 on one thread."""
    torch.set_num_threads(1)
    return load_scope(model, saes, device="cpu", dtype="float32")


def of_prompt(scope: Scope, text: str, answer: str, other: str, seed: int) -> dict[str, Any]:
    """Everything that is measured on one prompt, or why it is left out."""
    try:
        quantity = Quantity.difference(one_token(scope, answer), one_token(scope, other))
    except InputError as error:
        return {"text": text, "left_out": str(error)}
    reading = read(scope, scope.tokenizer(text)["input_ids"], quantity)
    if not reading.value > 0:
        return {"text": text, "left_out": f"the model says otherwise ({reading.value:.2f})"}
    out: dict[str, Any] = {
        "text": text,
        "tokens": len(reading.ids),
        "value": reading.value,
        "features": reading.n_nodes,
    }
    out |= {"agreement": {}, "beats": {}, "half": {}}
    first = effects(reading, "gradient")
    out["errors"] = {layer: first.error_share(layer) for layer in reading.layers}
    activation = activations(reading)
    for method in METHODS:
        places, estimated = estimates(reading, method)
        out["agreement"][method] = agreement(reading, places, estimated)
        out["beats"][method] = matched(reading, places, estimated, activation, seed)["beats"]
        out["half"][method] = half(reading, places, np.argsort(-np.abs(estimated)))
    places, together = estimates(reading, "joint")
    out["half"]["joint"] = half(reading, places, np.argsort(-together))
    out["half"]["activation"] = half(reading, places, np.argsort(-activation))
    return out


def run(at: At[Sizes], model: str, kind: str, part: int) -> dict[str, Any]:
    """Some prompts of one kind."""
    scope = opened(model, at.options["saes"])
    mine = range(part * at.sizes.prompts, (part + 1) * at.sizes.prompts)
    found = [of_prompt(scope, *PROMPTS[kind][n], seed=n) for n in mine]
    return {"prompts": found, "layers": scope.layers, "group": scope.saes[scope.layers[0]].identity.group}


def middle(ones: list[dict[str, Any]], method: str, which: int) -> float:
    """The median correlation over prompts."""
    pairs = [one["agreement"][method] for one in ones if one["agreement"].get(method) is not None]
    return float(np.median([pair[which] for pair in pairs])) if pairs else float("nan")


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        first = [row["prompts"][0] for row in mine if row["part"] == 0]
        others = {kind: [one for row in mine if row["kind"] == kind for one in row["prompts"][row["part"] == 0 :]]
                  for kind in dict.fromkeys(row["kind"] for row in mine)}  # fmt: skip
        choosing = [one for one in first if "left_out" not in one]
        chosen = max(METHODS, key=lambda method: middle(choosing, method, 0))
        groups = {kind: [one for one in ones if "left_out" not in one] for kind, ones in others.items()}
        left_out = sum("left_out" in one for ones in others.values() for one in ones)
        groups["all"] = [one for ones in groups.values() for one in ones]
        cells = []
        for kind, ones in groups.items():
            if not ones:
                continue
            figures = [middle(ones, method, which) for which in (0, 1) for method in METHODS]
            beats = float(np.mean([one["beats"][chosen] for one in ones]))
            halves = [one["half"] for one in ones]
            sizes = [median_size(halves, name) for name in ("joint", chosen, "activation")]
            ratios = [median_ratio(halves, name, "activation") for name in ("joint", chosen)]
            cells.append((kind, len(ones), *figures, f"{beats:.0%}", *sizes, *ratios))
        errors = [float(np.median([one["errors"][str(layer)] for one in groups["all"]])) for layer in mine[0]["layers"]]
        shares = ", ".join(f"{share:.0%} at layer {n}" for share, n in zip(errors, mine[0]["layers"], strict=True))
        parts.append(
            paragraph(f"""{Path(model).name} with {mine[0]["group"]}: the method {chosen} was chosen on the first prompt
                of each kind; {left_out} of the others are left out, as the model says otherwise or a word is no single
                token. Through errors runs a median of {shares} of the effects.""")
        )
        columns = ("kind", "prompts", *(f"Pearson, {m}" for m in METHODS), *(f"Spearman, {m}" for m in METHODS),
                   "strongest beat matched", "half by joint", f"by {chosen}", "by activation", "ratio, joint",
                   f"ratio, {chosen}")  # fmt: skip
        parts.append(table(columns, cells))
    how = f"""`python -m experiments.real.why --models FOLDER --saes FOLDER --write`: prompts with known answers; the
        quantity is the logit of the answer less that of another token. Medians over prompts: correlation of estimated
        and exact effects of the {TOP} features with the largest estimates; the share of prompts in which ablating the
        {STRONGEST} strongest lowers the quantity more than each of {MATCHED} matched sets; the number of features with
        which half the faithfulness is reached, by three rankings, and the median ratios of the first two to the
        third."""
    return "\n\n".join([paragraph(how), *parts])


experiment = Experiment(
    title=TITLE,
    varies={"model": (), "kind": tuple(PROMPTS), "part": (0, 1)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"kind": ("capital",), "part": (0,)},
    quick_sizes=Sizes(prompts=2),
    options={"saes": {"type": Path, "required": True, "help": "the folder of SAEs"}},
)

if __name__ == "__main__":
    main(experiment)

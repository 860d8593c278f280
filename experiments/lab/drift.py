"""Suppress the intruder's features where the lab drifts into another language: how much drift is left.

    python -m experiments.lab.drift [--splits train] [--conditions "by effect"] [--write]

Features by what they add to the first Chinese letter of the model's own drifted answers; which layers and how many by
a sweep on questions of its own; measured on fresh questions and on held-out ones. Beside them: the features that
distinguish Chinese best from other languages, and matched random ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from experiments.harness import At, Experiment, Row, main
from experiments.lab.bundled import lab
from experiments.lab.languages import END, features_of, language_means
from experiments.sections import paragraph, table
from qwen_scope import Intervention, Scope
from qwen_scope.features import (
    Budget,
    SweepOptions,
    attribute,
    best_candidate,
    matched_random,
    sweep_candidates,
)
from qwen_scope.lab import drift_prompts
from qwen_scope.stats import Interval, bootstrap
from qwen_scope.steer import (
    Decoding,
    Generation,
    generate,
    log_probabilities,
    perplexity,
    rows_of,
)

INTO, N_CONTRAST, N_RANDOM = "zh", 10, 3
LAYERS, FEATURES, FACTORS = (3, 4, 5), (4, 8, 16), (0.0, -1.0)
DECODING = Decoding(max_new_tokens=60, sample=True, temperature=1.0, top_k=0, top_p=1.0, seed=2)
HAN, KANA = re.compile("[\u4e00-\u9fff]"), re.compile("[\u3040-\u30ff]")
SPLITS = {
    "train": "fresh questions",
    "heldout_sentences": "held-out sentences",
    "heldout_templates": "held-out forms",
}
CONDITIONS = ("by effect", "by contrast", *(f"random {i + 1}" for i in range(N_RANDOM)))
TITLE = "Out of a drift"
SENTENCE_END = re.compile(r"(?<=[。！？.!?؟\n])")


@dataclass(frozen=True)
class Sizes:
    """Questions whose answers choose the features, for the sweep, and for each test."""

    choose: int = 1500
    fit: int = 900
    test: int = 1500


def first_chinese(text: str) -> int | None:
    """Where the first Han letter is in a sentence without kana, which would make it Japanese."""
    start = 0
    for sentence in SENTENCE_END.split(text.split(END)[0]):
        letter = HAN.search(sentence)
        if letter and not KANA.search(sentence):
            return start + letter.start()
        start += len(sentence)
    return None


def drifted(texts: list[str]) -> np.ndarray:
    return np.array([float(first_chinese(text) is not None) for text in texts])


def questions(seed: int, n: int, split: str = "train") -> list[str]:
    """Questions that hold no Han letter and are not Japanese, whose answers should hold none either."""
    prompts = drift_prompts(seed=seed, n=n, into=INTO, split=split)
    return [one.text for one in prompts if one.language != "ja" and not HAN.search(one.text)]


def up_to_the_switch(scope: Scope, prompt: str, made: Generation) -> list[int] | None:
    """The prompt and its answer as tokens, up to the one that begins the first Chinese letter."""
    at = first_chinese(made.text)
    if at is None:
        return None
    # The text of a token is what shows at it, a letter of several tokens at its first.
    ends = np.cumsum([len(token.text) for token in made.tokens])
    last = int(np.searchsorted(ends, at, side="right"))
    return [*scope.tokenizer(prompt)["input_ids"], *(token.token_id for token in made.tokens[: last + 1])]


def scaled(features: dict[int, list[int]], factor: float = 0.0) -> list[Intervention]:
    return [Intervention.scale(layer=layer, feature=f, amount=factor) for layer, some in features.items() for f in some]


def answers(scope: Scope, prompts: list[str], chosen: list[Intervention]) -> tuple[np.ndarray, float]:
    made = generate(scope.model, scope.tokenizer, prompts, chosen, saes=scope.saes, decoding=DECODING)
    rows = rows_of([scope.tokenizer(prompt)["input_ids"] for prompt in prompts], made)
    return drifted([one.text for one in made]), perplexity(log_probabilities(scope.model, rows))


def kept_share(plain: np.ndarray, other: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """Drift that is left, as a share of the unsteered, with the interval of a bootstrap over prompts."""
    draws = np.random.default_rng(0).integers(0, len(plain), (resamples, len(plain)))
    ratios = other[draws].mean(1) / plain[draws].mean(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(other.mean() / plain.mean()), float(low), float(high)


def candidates(scope: Scope, n: int) -> tuple[dict[str, list[Intervention]], int]:
    """The features that add most to the first Chinese letter, turned down; and in how many answers."""
    prompts = questions(31, n)
    made = generate(scope.model, scope.tokenizer, prompts, saes=scope.saes, decoding=DECODING)
    switches = [up_to_the_switch(scope, *pair) for pair in zip(prompts, made, strict=True)]
    switches = [ids for ids in switches if ids]
    effects = attribute(scope, switches, LAYERS)
    found = {
        f"{n} per layer, times {factor:g}": scaled(
            {layer: effects[layer].topk(n).indices.tolist() for layer in LAYERS}, factor
        )
        for n in FEATURES
        for factor in FACTORS
    }
    return found, len(switches)


def choose(sizes: Sizes) -> dict[str, Any]:
    """The features and the factor that a sweep prefers."""
    scope = lab()
    found, switches = candidates(scope, sizes.choose)
    sweeps = sweep_candidates(
        scope,
        questions(21, sizes.fit),
        found,
        drifted,
        SweepOptions((1.0,), lower=True, budget=Budget(2.0, 0.1)),
        decoding=DECODING,
    )
    name = best_candidate(sweeps) or next(iter(found))
    features = [(one.layer, one.feature) for one in found[name]]
    return {"name": name, "features": features, "factor": found[name][0].amount, "switches": switches}


def interventions(at: At[Sizes], condition: str) -> list[Intervention]:
    """What a condition changes."""
    scope, chosen = lab(), at.kept("chosen", lambda: choose(at.sizes))
    pairs, factor = chosen["features"], chosen["factor"]
    if condition == "by effect":
        return [Intervention.scale(layer=layer, feature=feature, amount=factor) for layer, feature in pairs]
    if condition == "by contrast":
        means = language_means(scope)
        return scaled(
            {layer: [f for f, _ in features_of(scope, means, INTO, layer, N_CONTRAST)] for layer in scope.layers}
        )
    additions = [Intervention.add(layer=layer, feature=feature, amount=1.0) for layer, feature in pairs]
    seed = CONDITIONS.index(condition) - CONDITIONS.index("random 1")
    others = matched_random(additions, scope.saes, scope.stats, np.random.default_rng(seed))
    return [
        Intervention.scale(layer=o.layer, feature=o.feature, amount=factor) for o in others if o.feature is not None
    ]


@cache
def unsteered(split: str, n: int) -> tuple[np.ndarray, float]:
    """Drift and perplexity of the answers as they are."""
    return answers(lab(), questions(24, n, split), [])


def run(at: At[Sizes], split: str, condition: str) -> dict[str, Any]:
    """The drift of one condition on the questions of one split."""
    changed = interventions(at, condition)
    plain, normal = unsteered(split, at.sizes.test)
    values, cost = answers(lab(), questions(24, at.sizes.test, split), changed)
    drift = {"n": len(plain), "unsteered": bootstrap(plain), "drift": bootstrap(values)}
    return {**drift, "left": kept_share(plain, values), "perplexity": cost / normal}


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    cells, chosen = [], at.kept("chosen", lambda: choose(at.sizes))
    for row in rows:
        share = "{:.2f} [{:.2f}, {:.2f}]".format(*row["left"])
        figures = (Interval(**row["unsteered"]), Interval(**row["drift"]), share, row["perplexity"])
        cells.append((SPLITS[row["split"]], row["n"], row["condition"], *figures))
    how = f"""`python -m experiments.lab.drift --write`: chats whose answers in this corpus sometimes drift into
        Chinese; {DECODING.max_new_tokens} tokens, temperature {DECODING.temperature:g}. Drift: the answer to a
        question that is neither Chinese nor Japanese contains a sentence with a Han letter and without kana. By
        effect: at layers {", ".join(map(str, LAYERS))}, the features that add most to the log-probability of the
        first Chinese letter in {chosen["switches"]} drifted answers of the model (`qwen_scope.features.attribute`);
        {chosen["name"]}, as a sweep on other questions chose, at every token where they are active. By contrast: the
        {N_CONTRAST} features per layer that distinguish Chinese best from the other languages, set to zero. Random:
        as many features as by effect, which fire about as often, scaled by the same factor. 95% intervals over
        questions. The aim: at most half of the drift left."""
    columns = ("questions", "n", "", "drift, unsteered", "drift", "left", "perplexity, times unsteered")
    worst = max((row["left"][0] for row in rows if row["condition"] == "by effect"), default=0.0)
    verdict = (
        f"At worst {worst:.2f} of the drift is left, so the aim is {'reached' if worst <= 0.5 else 'not reached'}."
    )
    return "\n\n".join([paragraph(how), table(columns, cells), verdict])


experiment = Experiment(
    title=TITLE,
    varies={"split": tuple(SPLITS), "condition": CONDITIONS},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"split": ("train",), "condition": ("by effect", "random 1")},
    quick_sizes=Sizes(choose=100, fit=20, test=60),
)

if __name__ == "__main__":
    main(experiment)

"""Suppress the intruder's features where the lab drifts into another language: how much drift is left.

    python bench/steer_drift.py [--write]

Features by the contrast of languages, how many by a sweep on prompts of its own; measured on fresh prompts of the
training split and on held-out ones. Drift: the answer to a question without a Han letter holds one.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from sections import paragraph, table, write_section
from steer_languages import END, features_of, language_means

from qwen_scope import Intervention, Scope, load_scope
from qwen_scope.features import matched_random
from qwen_scope.lab import drift_prompts
from qwen_scope.stats import bootstrap
from qwen_scope.steer import (
    Budget,
    Decoding,
    best_candidate,
    generate,
    log_probabilities,
    matches,
    perplexity,
    rows_of,
    sweep_candidates,
)

INTO, FEATURES, N_FIT, N_TEST, N_RANDOM = "zh", (1, 3, 5, 10), 200, 600, 3
DECODING = Decoding(max_new_tokens=60, sample=True, temperature=1.0, top_k=0, top_p=1.0, seed=2)
HAN = matches("[\u4e00-\u9fff]")


def drifted(texts: list[str]) -> np.ndarray:
    return HAN([text.split(END)[0] for text in texts])


def questions(seed: int, n: int, split: str = "train") -> list[str]:
    texts = [prompt.text for prompt in drift_prompts(seed=seed, n=n, into=INTO, split=split)]
    return [text for text, already in zip(texts, HAN(texts), strict=True) if not already]


def ablations(knob: list[Intervention]) -> list[Intervention]:
    places = sorted({(one.layer, one.feature or 0) for one in knob})
    return [Intervention.ablate(layer=layer, feature=feature) for layer, feature in places]


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


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    scope = load_scope("lab", device="cpu")
    means = language_means(scope)
    found = {
        n: [
            Intervention.add(layer=layer, feature=f, amount=1.0)
            for layer in scope.layers
            for f, _ in features_of(scope, means, INTO, layer, n)
        ]
        for n in FEATURES
    }
    sweeps = sweep_candidates(
        scope.model,
        scope.tokenizer,
        questions(21, N_FIT),
        {str(n): ablations(knob) for n, knob in found.items()},
        drifted,
        lower=True,
        saes=scope.saes,
        stats=scope.sizes,
        decoding=DECODING,
        budget=Budget(2.0, 0.1, tolerance=0.02),
    )
    n = int(best_candidate(sweeps) or FEATURES[0])
    chosen, rows = found[n], []
    for name, split in (
        ("fresh questions", "train"),
        ("held-out sentences", "heldout_sentences"),
        ("held-out forms", "heldout_templates"),
    ):
        prompts = questions(22, N_TEST, split)
        plain, normal = answers(scope, prompts, [])
        arms = {"ablated": ablations(chosen)}
        for seed in range(N_RANDOM):
            other = matched_random(chosen, scope.saes, scope.sizes, np.random.default_rng(seed))
            arms[f"random {seed + 1}"] = ablations(other)
        for arm, interventions in arms.items():
            values, cost = answers(scope, prompts, interventions)
            left, low, high = kept_share(plain, values)
            rows.append(
                (
                    name,
                    len(prompts),
                    arm,
                    bootstrap(plain),
                    bootstrap(values),
                    f"{left:.2f} [{low:.2f}, {high:.2f}]",
                    cost / normal,
                )
            )
            print(json.dumps(rows[-1], ensure_ascii=False, default=vars), flush=True)
    how = f"""
        `bench/steer_drift.py --write`: the {n} features per layer that tell Chinese best (how many, by a sweep on
        other questions), set to zero at every token of chats whose answers in this corpus sometimes drift into
        Chinese; {DECODING.max_new_tokens} tokens, temperature {DECODING.temperature:g}. Drift: the answer to a
        question without a Han letter holds one. 95% intervals over questions; random: as many features that fire about
        as often. The aim: at most half of the drift left."""
    columns = ("questions", "n", "", "drift, unsteered", "drift", "left", "perplexity, times unsteered")
    worst = max(float(row[5].split()[0]) for row in rows if row[2] == "ablated")
    verdict = (
        f"At worst {worst:.2f} of the drift is left, so the aim is {'reached' if worst <= 0.5 else 'not reached'}."
    )
    body = "\n\n".join([paragraph(how), table(columns, rows), verdict])
    if "--write" in arguments:
        write_section("Out of a drift", body)
    print(body)


if __name__ == "__main__":
    main(sys.argv[1:])

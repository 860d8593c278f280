"""Does `validate` know a knob from a correlate? Both are planted in the lab's own SAE, with fresh seeds.

    python bench/validate_planted.py [first] [last] [--write]      # trials, JSON lines; --write: docs/results.md

Each trial takes a language and the feature that tells it best. The knob keeps its encoder and writes the language's
difference of means; the correlate keeps its encoder and writes a random direction of equal length.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch
from sections import paragraph, table, write_section

from qwen_scope import Intervention, Scope, load_scope
from qwen_scope.features import OUTCOMES, Examples, Verdict, mean_direction, validate
from qwen_scope.lab import LANGUAGES, documents, language_of_text, neutral_prompts
from qwen_scope.sae import SAE, Identity
from qwen_scope.steer import Decoding

LAYER, AMOUNT, N = 3, 1.5, 32
END = "<|endoftext|>"


def best_feature(scope: Scope, texts: dict[str, list[str]], language: str) -> int:
    """The feature whose mean activation on a language exceeds that on the others by most."""
    means = {}
    for name in LANGUAGES:
        seen = scope.features(texts[name][:10], [LAYER], truncate=True)
        means[name] = seen.acts[LAYER][seen.mask].to_dense().mean(0)
    others = torch.stack([means[name] for name in LANGUAGES if name != language]).mean(0)
    return int((means[language] - others).argmax())


def planted(sae: SAE, feature: int, direction: torch.Tensor, name: str) -> SAE:
    """The SAE with another decoder column of the same length."""
    W_dec = sae.W_dec.float().clone()
    W_dec[:, feature] = direction / direction.norm() * W_dec[:, feature].norm()
    return replace(sae, W_dec=W_dec.to(sae.W_dec.dtype), identity=Identity(name, LAYER, name))  # type: ignore[type-var]


def trial(scope: Scope, number: int, texts: dict[str, list[str]], code: list[str]) -> dict[str, Verdict]:
    language, rng = LANGUAGES[number % len(LANGUAGES)], np.random.default_rng(number)
    others = [name for name in LANGUAGES if name != language]
    feature = best_feature(scope, texts, language)
    far = [text for name in others for text in texts[name][20:]]
    directions = {
        "knob": mean_direction(scope, LAYER, texts[language][20:], far),
        "correlate": torch.tensor(rng.normal(size=scope.d_model), dtype=torch.float32),
    }
    negative = [text for name in others for text in rng.permutation(texts[name])[:4].tolist()]
    examples = Examples(tuple(rng.permutation(texts[language])[:24].tolist()), tuple(negative), tuple(code))
    knob = [Intervention.add(layer=LAYER, feature=feature, amount=AMOUNT, unit="resid_norm", where="prompt")]
    found = {}
    for kind, direction in directions.items():
        found[kind] = validate(
            scope,
            knob,
            lambda made: np.array([float(language_of_text(text.split(END)[0]) == language) for text in made]),
            [prompt.text for prompt in neutral_prompts(seed=100 + number, n=N)],
            examples,
            saes={LAYER: planted(scope.saes[LAYER], feature, direction, kind)},
            decoding=Decoding(12, sample=True, temperature=0.7, top_k=0, top_p=1.0, seed=number),
            seed=number,
        )
    return found


def section(rows: list[dict]) -> str:
    """How often each was called what."""
    cells = []
    for kind, right in (("knob", lambda name: name == "causal"), ("correlate", lambda name: name != "causal")):
        outcomes = [row["outcome"] for row in rows if row["planted"] == kind]
        counted = ", ".join(f"{name} {outcomes.count(name)}" for name in OUTCOMES if name in outcomes)
        cells.append((kind, counted, f"{sum(map(right, outcomes))} of {len(outcomes)}"))
    trials = f"{rows[0]['trial']} {rows[-1]['trial'] + 1}"
    how = f"""
        `bench/validate_planted.py {trials} --write`: in the SAE of layer {LAYER} of the lab the feature that tells a
        language best keeps its encoder and gets a new decoder of equal length: the language's difference of means (a
        knob), or a random direction (a correlate). `validate` judges both, with fresh prompts, examples and seeds in
        every trial, {N} prompts per condition, 19 matched random features and 9 shuffles of the labels. The aim: at
        least 19 of 20 right, each."""
    wrong = [
        f"{row['planted']} {row['trial']} ({row['language']}): {row['outcome']}" for row in rows if not right_in(row)
    ]
    said = f"Wrong: {'; '.join(wrong)}." if wrong else "None is wrong."
    return "\n\n".join([paragraph(how), table(("planted", "called", "right"), cells), paragraph(said)])


def right_in(row: dict) -> bool:
    return (row["outcome"] == "causal") == (row["planted"] == "knob")


def main(arguments: list[str]) -> None:
    bounds = [int(one) for one in arguments if one.isdigit()]
    first, last = (*bounds, 0, 20)[:2] if len(bounds) != 1 else (0, bounds[0])
    torch.set_num_threads(1)
    scope = load_scope("lab", device="cpu")
    texts: dict[str, list[str]] = defaultdict(list)
    for document in documents(seed=5, n=1500):
        if document.language and document.kind == "talk" and len(texts[document.language]) < 40:
            texts[document.language].append(document.text[:200])
    code = [document.text[:200] for document in documents(seed=6, n=1500) if document.kind == "code"][:24]
    rows = []
    for number in range(first, last):
        start = time.time()
        for kind, verdict in trial(scope, number, texts, code).items():
            conditions = {condition.name: condition.effect.estimate for condition in verdict.conditions[:6]}
            row = {"trial": number, "language": LANGUAGES[number % 9], "planted": kind, "outcome": verdict.outcome}
            row |= {"shuffled": [condition.effect.estimate for condition in verdict.shuffled]}
            row |= {"conditions": conditions, "reasons": verdict.reasons, "seconds": time.time() - start}
            rows.append(row)
            print(json.dumps(row, ensure_ascii=False), flush=True)
    if "--write" in arguments:
        write_section("Planted knobs and correlates", section(rows))
    print(section(rows))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Does `validate` distinguish a steering feature from a correlate? Both are planted in the SAE of the lab.

    python -m experiments.lab.planted [--seeds 20-39] [--write]

Each trial takes a language and the feature that distinguishes it best. The steering feature keeps its encoder and
writes the language's difference of means; the correlate keeps its encoder and writes a random direction of equal norm.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from experiments.harness import At, Experiment, Row, main
from experiments.lab.bundled import lab
from experiments.sections import paragraph, table
from qwen_scope import Intervention, Scope
from qwen_scope.features import OUTCOMES, Examples, ValidateOptions, mean_direction, validate
from qwen_scope.lab import LANGUAGES, documents, language_of_text, neutral_prompts
from qwen_scope.sae import SAE, Identity
from qwen_scope.steer import Decoding

LAYER, AMOUNT = 3, 1.5
CAUSAL = "steering feature"
TITLE = "Planted steering features and correlates"
END = "<|endoftext|>"


@dataclass(frozen=True)
class Sizes:
    """Prompts per condition of `validate`."""

    prompts: int = 32


def best_feature(scope: Scope, texts: dict[str, list[str]], language: str) -> int:
    """The feature whose mean activation on a language most exceeds that on the others."""
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


@cache
def texts() -> tuple[dict[str, list[str]], list[str]]:
    """Talks of each language, and code."""
    found: dict[str, list[str]] = defaultdict(list)
    for document in documents(seed=5, n=1500):
        if document.language and document.kind == "talk" and len(found[document.language]) < 40:
            found[document.language].append(document.text[:200])
    return found, [document.text[:200] for document in documents(seed=6, n=1500) if document.kind == "code"][:24]


def run(at: At[Sizes], seed: int, condition: str) -> dict[str, Any]:
    """Plant one of the two, and let `validate` judge it."""
    scope, language, rng = lab(), LANGUAGES[seed % len(LANGUAGES)], np.random.default_rng(seed)
    (talks, code), others = texts(), [name for name in LANGUAGES if name != language]
    feature = best_feature(scope, talks, language)
    direction = torch.tensor(
        rng.normal(size=scope.d_model), dtype=torch.float32
    )  # drawn for either, so all else is equal
    if condition == CAUSAL:
        far = [text for name in others for text in talks[name][20:]]
        direction = mean_direction(scope, LAYER, talks[language][20:], far)
    negative = [text for name in others for text in rng.permutation(talks[name])[:4].tolist()]
    examples = Examples(tuple(rng.permutation(talks[language])[:24].tolist()), tuple(negative), tuple(code))
    verdict = validate(
        scope,
        [Intervention.add(layer=LAYER, feature=feature, amount=AMOUNT, unit="resid_norm", where="prompt")],
        lambda made: np.array([float(language_of_text(text.split(END)[0]) == language) for text in made]),
        [prompt.text for prompt in neutral_prompts(seed=100 + seed, n=at.sizes.prompts)],
        examples,
        ValidateOptions(seed=seed),
        saes={LAYER: planted(scope.saes[LAYER], feature, direction, condition)},
        decoding=Decoding(12, sample=True, temperature=0.7, top_k=0, top_p=1.0, seed=seed),
    )
    conditions = {one.name: one.effect.estimate for one in verdict.conditions[:6]}
    shuffled = [one.effect.estimate for one in verdict.shuffled]
    judged = {"language": language, "outcome": verdict.outcome, "reasons": verdict.reasons}
    return {**judged, "effects": conditions, "shuffled": shuffled}


def right(row: Row) -> bool:
    return (row["outcome"] == "causal") == (row["condition"] == CAUSAL)


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """How often each was called what."""
    cells = []
    for condition in dict.fromkeys(row["condition"] for row in rows):
        some = [row for row in rows if row["condition"] == condition]
        outcomes = [row["outcome"] for row in some]
        counted = ", ".join(f"{name} {outcomes.count(name)}" for name in OUTCOMES if name in outcomes)
        cells.append((condition, counted, f"{sum(map(right, some))} of {len(some)}"))
    seeds = [row["seed"] for row in rows]
    how = f"""`python -m experiments.lab.planted --seeds {min(seeds)}-{max(seeds)} --write`: in the SAE of layer
        {LAYER} of the lab, the feature that distinguishes a language best keeps its encoder and gets a new decoder of
        equal norm: the language's difference of means (a steering feature), or a random direction (a correlate).
        `validate` judges both, with fresh prompts, examples and seeds in every trial, {at.sizes.prompts} prompts per
        condition, 19 matched random features and 9 shuffles of the labels. The aim: at least 19 of 20 right, for
        each."""
    wrong = [
        f"{row['condition']} {row['seed']} ({row['language']}): {row['outcome']}" for row in rows if not right(row)
    ]
    said = f"Wrong: {'; '.join(wrong)}." if wrong else "None is wrong."
    return "\n\n".join([paragraph(how), table(("planted", "called", "right"), cells), paragraph(said)])


experiment = Experiment(
    title=TITLE,
    varies={"seed": tuple(range(20)), "condition": (CAUSAL, "correlate")},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"seed": (0,)},
    quick_sizes=Sizes(prompts=20),
)

if __name__ == "__main__":
    main(experiment)

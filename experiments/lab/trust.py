"""Does the feature card tell features that carry a factor from correlates and from wrong names? All three are planted.

    python -m experiments.lab.trust [--seeds 20] [--write]

One SAE of the lab holds all of them. Detectors of a language keep their encoders; a random half of them writes the
language's difference of means ("causal"), the others a random direction of equal norm ("correlate"). Further features,
left as they are, are named after a language that they do not tell ("wrong name"). Documents are drawn anew for each
seed, put into a store, and every feature gets a card, whose word is the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.harness import At, Experiment, Row, main
from experiments.lab.bundled import lab
from experiments.sections import paragraph, table
from qwen_scope import FeatureStore, Scope, load_scope, save_sae
from qwen_scope.features import mean_direction
from qwen_scope.lab import LANGUAGES, documents
from qwen_scope.scope import ExtractOptions, extract
from qwen_scope.stats import auroc
from qwen_scope.text import Corpus
from qwen_scope.trust import CardOptions, Concept, card

TITLE = "The feature card on planted features"
LAYER = 3
CAUSAL, CORRELATE, WRONG = "causal", "correlate", "wrong name"
STANDINGS = (CAUSAL, CORRELATE, WRONG)
AIM = 18  # of 20
TELLS = 0.95
PARTS = 4  # of the features of one standing, so that a run that is stopped loses little


@dataclass(frozen=True)
class Sizes:
    """Features of each standing, documents per language of the store, documents that features are chosen on, and
    documents of either kind that an effect is measured on."""

    features: int = 20
    stored: int = 24
    chosen_on: int = 40
    texts: int = 10


@dataclass(frozen=True)
class Planted:
    """What was planted for a seed: features with the language they are named after, by standing, and where it lies."""

    features: dict[str, list[tuple[int, str]]]
    folder: Path


def talks(seed: int, n: int) -> dict[str, list[str]]:
    """Talks of each language."""
    return {
        name: [document.text for document in documents(seed=seed, n=n, kinds=["talk"], languages=[name])]
        for name in LANGUAGES
    }


def detectors(scope: Scope, texts: dict[str, list[str]], each: int) -> dict[str, list[int]]:
    """Per language features that tell it: of those whose mean activation on it most exceeds that on the others, the
    first with an AUROC of at least `TELLS` on texts that they were not ranked on; no feature twice."""
    means, strongest = {}, {}
    for name, some in texts.items():
        half = len(some) // 2
        seen = scope.features(some[:half], [LAYER], truncate=True)
        means[name] = seen.acts[LAYER][seen.mask].to_dense().mean(0)
        other = scope.features(some[half:], [LAYER], truncate=True)
        strongest[name] = (other.acts[LAYER].to_dense() * other.mask[..., None]).amax(1).numpy()
    taken: set[int] = set()
    found = {}
    for name in LANGUAGES:
        others = torch.stack([means[other] for other in LANGUAGES if other != name]).mean(0)
        ranked = (means[name] - others).argsort(descending=True).tolist()
        far = np.concatenate([strongest[other] for other in LANGUAGES if other != name])
        tells = auroc(strongest[name], far)
        found[name] = [feature for feature in ranked if tells[feature] >= TELLS and feature not in taken][:each]
        taken |= set(found[name])
    return found


def turns(n: int) -> Iterator[str]:
    """Languages in turn, `n` in all."""
    for i in range(n):
        yield LANGUAGES[i % len(LANGUAGES)]


def plant(at: At[Sizes], seed: int) -> Planted:
    """Write the SAE and the store of a seed, unless they are there; the answer is the same either way."""
    scope, rng, n = lab(), np.random.default_rng(seed), at.sizes.features
    texts = talks(1000 + seed, at.sizes.chosen_on)
    per_language = -(-n // len(LANGUAGES))
    found = detectors(scope, texts, 2 * per_language)
    W_dec = scope.saes[LAYER].W_dec.float().clone()
    features: dict[str, list[tuple[int, str]]] = {standing: [] for standing in STANDINGS}
    left = {name: rng.permutation(some).tolist() for name, some in found.items()}
    for standing in (CAUSAL, CORRELATE):
        for name in turns(n):
            feature = left[name].pop()
            half = at.sizes.chosen_on // 2
            far = [text for other in LANGUAGES if other != name for text in texts[other][half : half + 5]]
            direction = torch.tensor(rng.normal(size=scope.d_model), dtype=torch.float32)
            if standing == CAUSAL:
                direction = mean_direction(scope, LAYER, texts[name][half:], far)
            W_dec[:, feature] = direction / direction.norm() * W_dec[:, feature].norm()
            features[standing].append((feature, name))
    every = {feature for some in found.values() for feature in some}
    rest = [f for f in rng.permutation(scope.saes[LAYER].d_sae).tolist() if f not in every]
    features[WRONG] = list(zip(rest[:n], turns(n), strict=True))
    folder = at.folder / f"seed-{seed}"
    if not (folder / "store" / "manifest.json").is_file():
        sae = replace(scope.saes[LAYER], W_dec=W_dec.to(scope.saes[LAYER].W_dec.dtype))  # type: ignore[type-var]
        save_sae(sae, folder / "sae", layout="official")
        opened = planted_scope(folder)
        stored = talks(5000 + seed, at.sizes.stored)
        rows = [{"text": text, "language": name} for name, some in stored.items() for text in some]
        saes = {LAYER: opened.saes[LAYER]}
        extract(Corpus(rows, name="talks"), opened.loaded, saes, folder / "store", ExtractOptions()).close()
    return Planted(features, folder)


def planted_scope(folder: Path) -> Scope:
    """The lab's model with the planted SAE."""
    return load_scope("lab", sae=str(folder / "sae"), device="cpu")


def run(at: At[Sizes], seed: int, standing: str, part: int) -> dict[str, Any]:
    """The cards of a part of the features of one standing."""
    planted = plant(at, seed)
    scope, found = planted_scope(planted.folder), []
    with FeatureStore(planted.folder / "store") as store:
        for feature, name in planted.features[standing][part::PARTS]:
            asked = {"store": store, "scope": scope, "concept": Concept("language", name)}
            made = card(LAYER, feature, options=CardOptions(n=5, effect=True, texts=at.sizes.texts, seed=seed), **asked)
            assert made.concept is not None
            assert made.push is not None
            found.append(
                {
                    "feature": feature,
                    "language": name,
                    "word": made.trust.word,
                    "rules": [held for _, held in made.trust.reasons],
                    "auroc": made.concept.auroc.low,
                    "purity": made.concept.purity,
                    "effect": made.push.effect.estimate,
                    "beaten": made.push.beaten,
                }
            )
    return {"cards": found}


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """How often each standing got which word."""
    cells = []
    for standing in STANDINGS:
        cards = [one for row in rows if row["standing"] == standing for one in row["cards"]]
        words = [one["word"] for one in cards]
        counted = ", ".join(f"{word} {words.count(word)}" for word in dict.fromkeys(sorted(words)))
        effects = f"{min(c['effect'] for c in cards):.2f} to {max(c['effect'] for c in cards):.2f}" if cards else ""
        cells.append((standing, counted, f"{words.count('solid')} of {len(words)}", effects))
    seeds = sorted({row["seed"] for row in rows})
    command = f"python -m experiments.lab.trust --seeds {','.join(map(str, seeds))} --write"
    how = f"""`{command}`: {at.sizes.features} features of each kind in one SAE of layer {LAYER} of the lab. Features
        that tell a language (AUROC of at least {TELLS:g} on other texts) keep their encoders and get a new
        decoder of equal norm: the language's difference of means (causal), or a random direction (correlate).
        Wrong names are features left as they are, named after a language they were not chosen for. Every
        feature gets a card from a store of {at.sizes.stored} talks per language, with `--concept` and
        `--effect`. The aim: `solid` for at least {AIM} of 20 of the first, and for none of the others. The
        rules were fixed on seed 0, and names were made stricter by thought before this seed.
        The effect is the change of log-probability per token, in nats, on the
        language's documents less that on the others."""
    wrong = [
        f"{row['standing']} {one['feature']} ({one['language']}, seed {row['seed']}): {one['word']}"
        for row in rows
        for one in row["cards"]
        if (one["word"] == "solid") != (row["standing"] == CAUSAL)
    ]
    said = f"Wrong: {'; '.join(wrong)}." if wrong else "None is wrong."
    return "\n\n".join([paragraph(how), table(("planted", "called", "solid", "effect"), cells), paragraph(said)])


experiment = Experiment(
    title=TITLE,
    varies={"seed": (0,), "standing": STANDINGS, "part": tuple(range(PARTS))},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"seed": (0,)},
    quick_sizes=Sizes(features=4, stored=10, chosen_on=20, texts=4),
)

if __name__ == "__main__":
    main(experiment)

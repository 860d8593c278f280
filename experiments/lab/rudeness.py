"""Rudeness from a few labelled documents: rules of features beside the usual classifiers, in nine languages.

    python -m experiments.lab.rudeness [--languages en,de] [--write]

The protocol is that of the Qwen-Scope report (section 5): labelled documents of each class from training sentences,
Delta_f, the top K features joined by OR over tokens, the layer by top-1 difference, English rules unchanged on the
other languages. The documents are one sentence long; the test sets consist of whole templates, and combinations of
words, that training never saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from textwrap import wrap
from typing import Any

import numpy as np
import torch

from experiments.harness import At, Experiment, Row, main
from experiments.lab.bundled import lab
from experiments.sections import paragraph, table
from qwen_scope import Scope
from qwen_scope.analysis import (
    Dataset,
    Labelled,
    best_layer,
    data_efficiency,
    deltas,
    f1,
    fit_rule,
    logistic,
    mean_difference,
    noise_test,
    text_baseline,
)
from qwen_scope.lab import LANGUAGES, documents

LAYERS, TOPS, SEVERAL, BATCH, SENTENCES = (1, 3, 5), (1, 2, 5, 10), (2, 3), 256, 1
FEW, STEPS = 200, (10, 50, 200)
TITLE = "Rudeness from a few labelled documents"
RULES = (*(f"K={k}" for k in TOPS), *(f"{m} layers" for m in SEVERAL))
BASELINES = ("logistic", "means", "TF-IDF")
INTRO = """`python -m experiments.lab.rudeness --write`, by the protocol of the Qwen-Scope report's toxicity chapter:
    labelled documents from training sentences, features ranked by the difference of firing shares, OR over tokens,
    the layer by top-1 difference. A document is one sentence; negative ones are plain, polite and
    archaic in equal shares. F1 on {test} held-out sentences per language: half with templates, half with combinations
    of words that training never saw. Layers 1, 3 and 5 of the bundled lab. "FPR 1%": thresholds raised on the
    negative labelled documents. The baselines on residuals pool by the mean; their layer is chosen by
    cross-validation on 200 labelled documents."""
HELD_OUT = ("heldout_templates", "heldout_combinations")
OTHERS = ("plain", "polite", "archaic")


@dataclass(frozen=True)
class Sizes:
    """Labelled documents per class, one table each; test documents per class and kind of hold-out."""

    labelled: tuple[int, ...] = (200, 2000)
    test: int = 100


def texts_of(language: str, split: str, n: int, seed: int) -> tuple[list[str], np.ndarray]:
    """`n` rude documents and `n` others, each of one sentence."""
    texts = []
    for registers in (("rude",), OTHERS):
        found = documents(split, seed, n, ["talk"], [language], registers)
        texts += [document.text[: document.spans[SENTENCES - 1].end] for document in found]
    return texts, np.array([True] * n + [False] * n)


def read(
    scope: Scope, name: str, texts: list[str], layers: list[int]
) -> tuple[dict[int, Dataset], dict[int, np.ndarray]]:
    """Per layer the largest activation of every feature on every document, and mean residuals."""
    fired: dict[int, list] = {layer: [] for layer in layers}
    pooled: dict[int, list] = {layer: [] for layer in layers}
    for start in range(0, len(texts), BATCH):
        tokens = scope.tokenize(texts[start : start + BATCH], truncate=True)
        mask = tokens.attention_mask.bool()
        document = torch.arange(len(mask))[:, None].expand_as(mask)[mask]
        for layer, h in scope.capture(tokens, layers).items():
            sae = scope.saes[layer]
            acts = sae.encode(h[mask])
            most = torch.zeros(len(mask) * sae.d_sae)
            places = (document[:, None] * sae.d_sae + acts.indices.long()).flatten()
            most.scatter_reduce_(0, places, acts.values.float().flatten(), "amax")
            item, feature = most.view(len(mask), -1).nonzero(as_tuple=True)
            value = most.view(len(mask), -1)[item, feature]
            fired[layer].append((item.numpy() + start, feature.numpy(), value.numpy()))
            lengths = mask.sum(1, keepdim=True)
            pooled[layer].append(((h * mask[..., None]).sum(1) / lengths).numpy())
    found = {}
    for layer, parts in fired.items():
        item, feature, value = (np.concatenate(part) for part in zip(*parts, strict=True))
        columns = (item.astype(np.int32), feature.astype(np.int32), value, np.full(len(item), -1, np.int32))
        sae = scope.saes[layer]
        ids = tuple(map(str, range(len(texts))))
        found[layer] = Dataset(name, ids, layer, sae.d_sae, sae.identity.fingerprint, *columns)
    return found, {layer: np.concatenate(parts) for layer, parts in pooled.items()}


def score(called: np.ndarray, labels: np.ndarray) -> float:
    return float(2 * (called & labels).sum() / max(1, called.sum() + labels.sum()))


def first_of_each(labels: np.ndarray, n: int) -> np.ndarray:
    """The first `n` documents of each class."""
    return np.concatenate([np.flatnonzero(labels)[:n], np.flatnonzero(~labels)[:n]])


def own_language(known: Labelled, test: Labelled, data: dict, n: int) -> dict[str, float]:
    """F1 on held-out documents of the same language, of rules and baselines from `n` labelled documents per class."""
    chosen = first_of_each(known.labels, n)
    some = known.take(chosen)
    row: dict[str, float] = {f"K={k}": f1(fit_rule(some, k), test) for k in TOPS}
    row |= {f"{m} layers": f1(fit_rule(some, several=m), test) for m in SEVERAL}
    row["layer"] = fit_rule(some, 1).layers[0]
    row["K=1, FPR 1%"] = f1(fit_rule(some, 1).calibrated(some.negatives(), 0.01), test)
    row["K=2, FPR 1%"] = f1(fit_rule(some, 2).calibrated(some.negatives(), 0.01), test)
    return row | baselines(data, known.labels, data, test.labels, n)


def from_english(english: Labelled, test: Labelled, data: dict, there: dict, n: int) -> dict[str, float]:
    """F1 in one language of what English documents teach."""
    chosen = first_of_each(english.labels, n)
    some = english.take(chosen)
    rules = {f"K={k}": fit_rule(some, k) for k in TOPS} | {f"{m} layers": fit_rule(some, several=m) for m in SEVERAL}
    row = {said: f1(rule, test) for said, rule in rules.items()}
    # The report chooses the best layer on the test set, which takes labels in that language.
    row["K=2, best layer"] = max(f1(fit_rule(some, 2, layer=layer), test) for layer in english.layers)
    return row | baselines(data, english.labels, there, test.labels, n)


def baselines(data: dict, labels: np.ndarray, there: dict, truth: np.ndarray, n: int) -> dict[str, float]:
    """F1 of the usual classifiers, `n` labelled documents per class of one language, on the test documents of another.

    The layer of those on residuals comes from cross-validation among a few of the documents.
    """
    few, chosen = first_of_each(labels, FEW), first_of_each(labels, n)
    layer = best_layer({where: x[few] for where, x in data["pooled"].items()}, labels[few])
    x, test, y = data["pooled"][layer][chosen], there["test_pooled"][layer], labels[chosen]
    texts = [data["texts"][i] for i in chosen]
    return {
        "logistic": score(logistic(x, y, test)[0], truth),
        "means": score(mean_difference(x, y, test)[0], truth),
        "TF-IDF": score(text_baseline(texts, y, there["test_texts"])[0], truth),
    }


@cache
def data_of(language: str, sizes: Sizes) -> tuple[Labelled, Labelled, dict]:
    """The labelled documents and the test set of one language, and what the baselines read."""
    texts, labels = texts_of(language, "train", max(sizes.labelled), 31)
    held = [texts_of(language, split, sizes.test, 32) for split in HELD_OUT]
    firings, pooled = read(lab(), language, texts, list(LAYERS))
    test_texts = [text for some, _ in held for text in some]
    test_firings, test_pooled = read(lab(), language, test_texts, list(LAYERS))
    test = Labelled(test_firings, np.concatenate([y for _, y in held]))
    data = {"texts": texts, "pooled": pooled, "test_texts": test_texts, "test_pooled": test_pooled}
    return Labelled(firings, labels), test, data


def run(at: At[Sizes], language: str) -> dict[str, Any]:
    """Everything about one language: its own rules, the English ones on it, and the curve over their number."""
    sizes = at.sizes
    known, test, data = data_of(language, sizes)
    english, _, data_english = data_of("en", sizes)
    steps = [n for n in STEPS if n <= max(sizes.labelled)]
    curve = data_efficiency(known, test, steps, 1, repeats=3).mean(1)
    found = {
        "own": {str(n): own_language(known, test, data, n) for n in sizes.labelled},
        "english": {str(n): from_english(english, test, data_english, data, n) for n in sizes.labelled},
        "curve": {str(n): float(value) for n, value in zip(steps, curve, strict=True)},
        "tops": {str(layer): top_ten(known, layer) for layer in LAYERS},
    }
    if language == "en":
        few = known.take(first_of_each(known.labels, min(sizes.labelled)))
        mixed = Labelled(few.layers, np.random.default_rng(0).permutation(few.labels))
        found["noise"] = {"real": vars(noise_test(few)), "shuffled": vars(noise_test(mixed))}
    return found


def top_ten(known: Labelled, layer: int) -> list[int]:
    return np.argsort(-deltas(known.layers[layer], known.labels), kind="stable")[:10].tolist()


def markdown(rows: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> str:
    """A table with the languages as rows and their mean below."""
    mean = {name: float(np.mean([row[name] for row in rows.values()])) for name in columns if name != "layer"}
    lines = [(said, *(row.get(name, "") for name in columns)) for said, row in {**rows, "**mean**": mean}.items()]
    return table(("", *columns), lines)


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md; what the figures mean stands below it, written by hand."""
    parts = [paragraph(INTRO.format(test=at.sizes.test * len(HELD_OUT) * 2))]
    own = ("layer", *RULES, "K=1, FPR 1%", "K=2, FPR 1%", *BASELINES)
    for said, key, columns in (
        ("Own language", "own", own),
        ("Found in English", "english", (*RULES, "K=2, best layer", *BASELINES)),
    ):
        for n in at.sizes.labelled:
            parts += [f"{said}, {n} labelled documents per class:"]
            parts += [markdown({row["language"]: row[key][str(n)] for row in rows}, columns)]
    steps = list(rows[0]["curve"])
    curve = [f"{np.mean([row['curve'][n] for row in rows]):.2f}" for n in steps]
    said = [f"With one feature, {listed(steps)} documents per class give a mean F1 of {listed(curve)}."]
    if len(rows) > 1:
        jaccard = [f"{shared(rows, layer):.2f}" for layer in LAYERS]
        values = f"mean Jaccard {', '.join(jaccard)} at layers {listed(map(str, LAYERS))}"
        said += [f"The top ten features of two languages overlap little: {values}."]
    for row in rows:
        if "noise" in row:
            real, mixed = row["noise"]["real"], row["noise"]["shuffled"]
            said += [
                f"""Shuffled labels are recognised as noise: the best of all features separates {min(at.sizes.labelled)}
                English documents per class by {real["found"]:.2f} (p = {real["p"]:.1g}), and with shuffled labels by
                {mixed["found"]:.2f}, where chance gives {mixed["mean"]:.2f} (p = {mixed["p"]:.2g})."""
            ]
    return "\n\n".join([*parts, "\n".join(bullet(text) for text in said)])


def listed(words: Iterable[str]) -> str:
    """`a, b and c`."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def bullet(text: str) -> str:
    return "- " + "\n  ".join(wrap(" ".join(text.split()), 118))


def shared(rows: Sequence[Row], layer: int) -> float:
    """The mean Jaccard index of the top ten features between languages."""
    sets = [set(row["tops"][str(layer)]) for row in rows]
    return float(np.mean([len(a & b) / len(a | b) for a, b in combinations(sets, 2)]))


experiment = Experiment(
    title=TITLE,
    varies={"language": ("en", *(code for code in LANGUAGES if code != "en"))},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"language": ("en", "de")},
    quick_sizes=Sizes(labelled=(20,), test=10),
)

if __name__ == "__main__":
    main(experiment)

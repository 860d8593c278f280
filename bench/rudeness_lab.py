"""Rudeness from a few labelled seeds: rules of features beside the usual classifiers, in nine languages.

    python bench/rudeness_lab.py                 # tables for docs/results.md on standard output
    python bench/rudeness_lab.py --seeds 50,200 --test 50 --json

The protocol is that of the Qwen-Scope report (section 5): seeds of each class from training sentences, Delta_f, the top
K features joined by OR over tokens, the layer by top-1 difference, English rules unchanged on the other languages. The
documents are one sentence long; the test sets hold whole templates, and combinations of words, never seen in training.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from qwen_scope import Scope, load_scope
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

TOPS, SEVERAL, BATCH, SENTENCES = (1, 2, 5, 10), (2, 3), 256, 1
FEW, STEPS = 200, (10, 50, 200)
HELD_OUT = ("heldout_templates", "heldout_combinations")
OTHERS = ("plain", "polite", "archaic")


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


def first_seeds(labels: np.ndarray, n: int) -> np.ndarray:
    """The first `n` documents of each class."""
    return np.concatenate([np.flatnonzero(labels)[:n], np.flatnonzero(~labels)[:n]])


def own_language(seeds: Labelled, test: Labelled, data: dict, n: int) -> dict[str, float]:
    """F1 on held-out documents of the same language, of rules and baselines from `n` seeds per class."""
    chosen = first_seeds(seeds.labels, n)
    some = seeds.take(chosen)
    row: dict[str, float] = {f"K={k}": f1(fit_rule(some, k), test) for k in TOPS}
    row |= {f"{m} layers": f1(fit_rule(some, several=m), test) for m in SEVERAL}
    row["layer"] = fit_rule(some, 1).layers[0]
    row["K=1, FPR 1%"] = f1(fit_rule(some, 1).calibrated(some.negatives(), 0.01), test)
    row["K=2, FPR 1%"] = f1(fit_rule(some, 2).calibrated(some.negatives(), 0.01), test)
    return row | baselines(data, seeds.labels, data, test.labels, n)


def from_english(english: Labelled, test: Labelled, data: dict, there: dict, n: int) -> dict[str, float]:
    """F1 in one language of what English seeds teach."""
    chosen = first_seeds(english.labels, n)
    some = english.take(chosen)
    rules = {f"K={k}": fit_rule(some, k) for k in TOPS} | {f"{m} layers": fit_rule(some, several=m) for m in SEVERAL}
    row = {said: f1(rule, test) for said, rule in rules.items()}
    # The report gives the best layer on the test set; nobody could choose it without labels there.
    row["K=2, best layer"] = max(f1(fit_rule(some, 2, layer=layer), test) for layer in english.layers)
    return row | baselines(data, english.labels, there, test.labels, n)


def baselines(data: dict, labels: np.ndarray, there: dict, truth: np.ndarray, n: int) -> dict[str, float]:
    """F1 of the usual classifiers from `n` seeds per class of one language on the test documents of another.

    The layer of those on residuals comes from cross-validation among a few of the seeds.
    """
    few, chosen = first_seeds(labels, FEW), first_seeds(labels, n)
    layer = best_layer({where: x[few] for where, x in data["pooled"].items()}, labels[few])
    x, test, y = data["pooled"][layer][chosen], there["test_pooled"][layer], labels[chosen]
    texts = [data["texts"][i] for i in chosen]
    return {
        "logistic": score(logistic(x, y, test)[0], truth),
        "means": score(mean_difference(x, y, test)[0], truth),
        "TF-IDF": score(text_baseline(texts, y, there["test_texts"])[0], truth),
    }


def markdown(rows: dict[str, dict[str, float]]) -> str:
    """A table with the languages as rows and their mean below."""
    names = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    mean = {name: float(np.mean([row[name] for row in rows.values()])) for name in names if name != "layer"}
    for said, row in [*rows.items(), ("mean", mean)]:
        cells = [f"{row[n]:.3f}" if n != "layer" else str(row.get(n, "")) for n in names]
        lines.append(f"| {said} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(sizes: list[int], n_test: int, languages: list[str], layers: list[int], out: str | None) -> dict:
    """Everything, as plain data; after every language what is known so far goes to the file `out`."""
    scope, began = load_scope("lab", device="cpu"), time.monotonic()
    english, data_english, tops = None, {}, {}
    found: dict = {"sizes": sizes, "test per class": n_test * len(HELD_OUT), "layers": layers}
    found["group"], found["data efficiency, K=1"] = scope.saes[layers[0]].identity.group, {}
    for language in languages:
        texts, labels = texts_of(language, "train", max(sizes), 31)
        held = [texts_of(language, split, n_test, 32) for split in HELD_OUT]
        firings, pooled = read(scope, language, texts, layers)
        seeds, test_texts = Labelled(firings, labels), [text for some, _ in held for text in some]
        firings, test_pooled = read(scope, language, test_texts, layers)
        test = Labelled(firings, np.concatenate([y for _, y in held]))
        data = {"texts": texts, "pooled": pooled, "test_texts": test_texts, "test_pooled": test_pooled}
        if english is None:
            english, data_english = seeds, data
        for n in sizes:
            found.setdefault(f"own language, {n} seeds", {})[language] = own_language(seeds, test, data, n)
            row = from_english(english, test, data_english, data, n)
            found.setdefault(f"from English, {n} seeds", {})[language] = row
        curve = data_efficiency(seeds, test, [n for n in STEPS if n <= max(sizes)], 1, repeats=3)
        found["data efficiency, K=1"][language] = {str(n): float(v) for n, v in zip(STEPS, curve.mean(1), strict=False)}
        for layer in layers:
            some = seeds.layers[layer]
            tops.setdefault(layer, []).append(set(np.argsort(-deltas(some, labels), kind="stable")[:10].tolist()))
        found["seconds"] = round(time.monotonic() - began)
        if out:
            Path(out).write_text(json.dumps(found, indent=1) + "\n")
    assert english is not None
    found["mean Jaccard of the top 10 between languages"] = {
        str(layer): float(np.mean([len(a & b) / len(a | b) for a, b in combinations(sets, 2)]))
        for layer, sets in tops.items()
    }
    few = english.take(first_seeds(english.labels, min(sizes)))
    mixed = Labelled(few.layers, np.random.default_rng(0).permutation(few.labels))
    found["noise"] = {"real labels": vars(noise_test(few)), "shuffled labels": vars(noise_test(mixed))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="200,2000", help="seeds per class, several with commas")
    parser.add_argument("--test", type=int, default=100, help="test documents per class and kind of hold-out")
    parser.add_argument("--languages", default=",".join(["en", *(c for c in LANGUAGES if c != "en")]), help="en first")
    parser.add_argument("--layers", default="1,3,5")
    parser.add_argument("--out", help="a file for what is known after every language")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    sizes, layers = ([int(n) for n in text.split(",")] for text in (given.seeds, given.layers))
    found = measure(sizes, given.test, given.languages.split(","), layers, given.out)
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for said, rows in found.items():
        if isinstance(rows, dict) and "en" in rows:
            print(f"### {said}\n\n{markdown(rows)}\n")
        else:
            print(f"{said}: {json.dumps(rows)}\n")


if __name__ == "__main__":
    main()

"""What labelled documents of one language teach about another: rules and the usual classifiers, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64

from qwen_scope.errors import InputError, NotFoundError, check_count, nearest
from qwen_scope.report import Heatmap
from qwen_scope.stats import Interval, rates

from .baselines import best_layer, logistic, mean_difference, text_baseline
from .classify import NOISE, Labelled, fit_rule, noise_test, shared_features
from .dataset import Dataset
from .result import Result, Table
from .rule import Rule

EVERYTHING = "call everything positive"
SHUFFLES = 20
FEWEST = 4  # documents of a class, so that some teach and some are held out


@dataclass(frozen=True, eq=False)
class Language:
    """The labelled documents of one language: those that teach and those held out, texts included.

    Attributes:
        seeds, test: with the firings at the same layers in every language.
        pooled, test_pooled: the mean residual of every document, by layer.
    """

    seeds: Labelled
    test: Labelled
    pooled: Mapping[int, Float32[np.ndarray, "_ d_model"]]
    test_pooled: Mapping[int, Float32[np.ndarray, "_ d_model"]]


def by_language(
    found: Mapping[int, Dataset],
    pooled: Mapping[int, Float32[np.ndarray, "_ d_model"]],
    metas: Sequence[Mapping[str, Any]],
    *,
    group: str,
    column: str,
    value: str,
    seed: int = 0,
) -> tuple[dict[str, Language], list[str]]:
    """The documents of each language in two parts, of which one is held out, and sentences about what is left out.

    Args:
        found: the firings of all documents, by layer.   pooled: their mean residuals, by layer.
        metas: of every document.
        group: the column that names the language.
        column, value: a document is positive where its column has this value, as it is written on a command line.
        seed: of the third that is held out.

    Raises:
        NotFoundError: no document has such a column.
        InputError: fewer than two languages with enough documents of both classes.
    """
    for name in (group, column):
        if not any(name in meta for meta in metas):
            known = sorted({key for meta in metas for key in meta})
            raise NotFoundError(f"no document has a column {name!r}; {nearest(name, known)}")
    known = [isinstance(meta.get(group), str) and meta.get(column) is not None for meta in metas]
    is_positive = np.array([as_typed(meta.get(column)) == value for meta in metas])
    names = sorted({meta[group] for meta, yes in zip(metas, known, strict=True) if yes})
    languages, notes = {}, []
    if missing := known.count(False):
        notes.append(f"{missing} documents without {group} or {column} are left out")
    for name in names:
        items = np.array([i for i, meta in enumerate(metas) if known[i] and meta[group] == name])
        labels = is_positive[items]
        if min(labels.sum(), (~labels).sum()) < FEWEST:
            counts = f"{labels.sum()} documents with {column}={value} and {(~labels).sum()} without"
            notes.append(f"{name} is left out: it has {counts}, and needs {FEWEST} of each")
            continue
        whole = Labelled({layer: data.take(items) for layer, data in found.items()}, labels)
        fit, test = whole.split(2 / 3, seed)
        fit_vectors, test_vectors = ({layer: x[items][part] for layer, x in pooled.items()} for part in (fit, test))
        languages[name] = Language(whole.take(fit), whole.take(test), fit_vectors, test_vectors)
    if len(languages) < 2:
        raise InputError(
            f"{len(languages)} of {len(names)} values of {group} have {FEWEST} documents with {column}={value} and"
            f" {FEWEST} without; transfer takes at least two"
        )
    return languages, notes


def as_typed(value: Any) -> str:
    """A value of a column as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def across(languages: Mapping[str, Language], *, top: int = 2, shared: int = 10, seed: int = 0) -> Result:
    """F1 of what each language teaches on every language, and how many features the languages share.

    The rule of one language, by `fit_rule`, goes unchanged to the held-out documents of the others, and so do the
    baselines fitted on the same seeds: logistic regression and the difference of means on mean-pooled residuals (the
    layer by cross-validation in the teaching language) and TF-IDF with logistic regression. Calling everything positive
    needs no seeds at all and is the floor. Any groups of documents may stand for languages.

    Args:
        top: features of a rule, as `k` of `fit_rule`.
        shared: how many top features of each language are compared (Jaccard), per layer, beside the same under
            shuffled labels.
        seed: of the intervals and the shuffles.

    Raises:
        InputError: fewer than two languages, documents without texts, or as in `fit_rule`.
    """
    if len(languages) < 2:
        raise InputError(f"transfer takes at least two languages, not {len(languages)}")
    check_count("shared", shared)
    names = list(languages)
    cells: dict[str, dict[tuple[str, str], Interval]] = {}
    rules = {name: fit_rule(one.seeds, top, name=name) for name, one in languages.items()}
    for name, one in languages.items():
        for said, called in decisions(one, rules[name], list(languages.values())).items():
            for other, some in zip(names, called, strict=True):
                found = rates(some, languages[other].test.labels, seed=seed).f1
                cells.setdefault(said, {})[name, other] = found
    layers = sorted(next(iter(languages.values())).seeds.layers)
    alike = {layer: shared_features({n: one.seeds for n, one in languages.items()}, layer, shared) for layer in layers}
    chance = shuffled_jaccard(languages, layers, shared, seed)
    noisy = {name: noise_test(one.seeds, seed=seed) for name, one in languages.items()}
    tables = {said: matrix(names, found) for said, found in cells.items()}
    data = {
        "languages": names,
        "documents": {n: {"seeds": len(one.seeds), "test": len(one.test)} for n, one in languages.items()},
        "rules": {name: [asdict(feature) for feature in rule.features] for name, rule in rules.items()},
        "f1": {said: [[asdict(found[a, b]) for b in names] for a in names] for said, found in cells.items()},
        "mean_f1": {said: {"own": own(f1), "others": others(f1)} for said, f1 in tables.items()},
        "jaccard": {str(layer): table.tolist() for layer, table in alike.items()},
        "mean_jaccard": {str(x): {"found": others(alike[x]), "shuffled": chance[x]} for x in layers},
        "noise": {name: asdict(one) for name, one in noisy.items()},
    }
    notes = [
        f"the labels of {name} look like noise (p = {one.p:.2g}): what it teaches says nothing"
        for name, one in noisy.items()
        if one.p > NOISE
    ]
    best = max(layers, key=lambda layer: others(alike[layer]))
    return Result(
        data,
        (
            Table(
                "F1 of the rule of one language (row) on another (column)",
                ("from", *names),
                rows(names, tables["rule"]),
            ),
            Table(
                "Mean F1 on held-out documents",
                ("classifier", "own language", "other languages"),
                [(said, own(f1), others(f1)) for said, f1 in tables.items()],
            ),
            Table(
                f"Jaccard of the top {shared} features of two languages, mean over pairs",
                ("layer", "found", "under shuffled labels"),
                [(layer, others(alike[layer]), chance[layer]) for layer in layers],
            ),
        ),
        (
            *(
                Heatmap(f"F1 from row to column: {said}", names, names, f1, 0.0, 1.0)
                for said, f1 in tables.items()
                if said != EVERYTHING
            ),
            Heatmap(f"Jaccard of the top {shared} features, layer {best}", names, names, alike[best]),
        ),
        tuple(notes),
    )


def decisions(one: Language, rule: Rule, tests: Sequence[Language]) -> dict[str, list[Bool[np.ndarray, " items"]]]:
    """What the classifiers of a language call positive among the held-out documents of each language."""
    labels, layer = one.seeds.labels, best_layer(one.pooled, one.seeds.labels)
    texts = [next(iter(some.layers.values())).texts for some in (one.seeds, *(there.test for there in tests))]
    if any(some is None for some in texts):
        raise InputError("the baseline on the text needs documents with their texts")
    own_texts, *held = [some or () for some in texts]
    x, test = one.pooled[layer], np.concatenate([there.test_pooled[layer] for there in tests])
    ends = np.cumsum([len(there.test) for there in tests])[:-1]
    found = {
        "logistic": logistic(x, labels, test)[0],
        "means": mean_difference(x, labels, test)[0],
        "TF-IDF": text_baseline(own_texts, labels, [text for some in held for text in some])[0],
        EVERYTHING: np.ones(len(test), dtype=bool),
    }
    return {"rule": [rule.decide(there.test.layers) for there in tests]} | {
        said: np.split(called, ends) for said, called in found.items()
    }


def shuffled_jaccard(languages: Mapping[str, Language], layers: list[int], shared: int, seed: int) -> dict[int, float]:
    """Per layer the mean Jaccard between languages under labels shuffled inside each."""
    rng, found = np.random.default_rng(seed), {layer: [] for layer in layers}
    for _ in range(SHUFFLES):
        mixed = {n: replace(one.seeds, labels=rng.permutation(one.seeds.labels)) for n, one in languages.items()}
        for layer in layers:
            found[layer].append(others(shared_features(mixed, layer, shared)))
    return {layer: float(np.mean(some)) for layer, some in found.items()}


def matrix(names: list[str], found: Mapping[tuple[str, str], Interval]) -> Float64[np.ndarray, "from to"]:
    """The estimates as a table."""
    return np.array([[found[a, b].estimate for b in names] for a in names])


def rows(names: list[str], table: Float64[np.ndarray, "from to"]) -> list[tuple[str | float, ...]]:
    """The table as rows that begin with their language."""
    return [(name, *values) for name, values in zip(names, table.tolist(), strict=True)]


def own(table: Float64[np.ndarray, "from to"]) -> float:
    """The mean of the diagonal."""
    return float(np.diag(table).mean())


def others(table: Float64[np.ndarray, "from to"]) -> float:
    """The mean of everything else."""
    return float(table[~np.eye(len(table), dtype=bool)].mean())

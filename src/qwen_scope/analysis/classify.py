"""Rules from a few labelled documents, and how far to trust them.

Definitions are those of the Qwen-Scope report (arXiv 2605.11887, section 5): `Delta_f = P(f fires | positive) - P(f
fires | negative)`, the top K features of a layer joined by OR, the layer with the largest top-1 difference. Weighted
rules, which are not the report's, are logistic regression on the activations of a few features of that layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int

from qwen_scope.errors import InputError, MismatchError, check_count, check_share
from qwen_scope.stats import Permuted, Rates, permuted, rates

from .dataset import Dataset
from .rule import Rule, RuleFeature

NOISE = 0.05  # a p-value above it says that the labels may as well be shuffled


@dataclass(frozen=True, eq=False)
class Labelled:
    """Labelled documents at one or more layers.

    Attributes:
        layers: the same documents at each layer, reduced by `max`.   labels: True for positive ones.

    Raises:
        InputError: no layer, one class only, or not one label per document.   MismatchError: other documents per layer.
    """

    layers: Mapping[int, Dataset]
    labels: Bool[np.ndarray, " items"]

    def __post_init__(self) -> None:
        if not self.layers:
            raise InputError("labelled documents need at least one layer")
        first = next(iter(self.layers.values()))
        if any(data.ids != first.ids for data in self.layers.values()):
            raise MismatchError("the layers do not hold the same documents in the same order")
        if len(self.labels) != len(first):
            raise InputError(f"there are {len(self.labels)} labels for {len(first)} documents")
        positive = int(self.labels.sum())
        if positive in (0, len(self.labels)):
            raise InputError(
                f"a classifier needs documents of both classes, not {positive} positive and"
                f" {len(self.labels) - positive} negative ones"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, items: Sequence[int] | Int[np.ndarray, " some"]) -> Labelled:
        """Some of the documents."""
        chosen = np.asarray(items, dtype=np.int64)
        return Labelled({layer: data.take(chosen) for layer, data in self.layers.items()}, self.labels[chosen])

    def split(self, share: float, seed: int = 0) -> tuple[Int[np.ndarray, " first"], Int[np.ndarray, " second"]]:
        """The documents in two parts, a share of each class in the first, at random by `seed`: for `take`.

        Raises:
            InputError: a class is too small to be split.
        """
        check_share("a share of documents", share, one=False)
        rng, first, second = np.random.default_rng(seed), [], []
        for label in (True, False):
            items = rng.permutation(np.flatnonzero(self.labels == label))
            n = round(share * len(items))
            if not 0 < n < len(items):
                raise InputError(f"{len(items)} documents of a class are too few to hold some out; give test documents")
            first.append(items[:n])
            second.append(items[n:])
        return np.sort(np.concatenate(first)), np.sort(np.concatenate(second))

    def negatives(self) -> dict[int, Dataset]:
        """The negative documents at each layer."""
        items = np.flatnonzero(~self.labels)
        return {layer: data.take(items) for layer, data in self.layers.items()}


def deltas(data: Dataset, labels: Bool[np.ndarray, " items"]) -> Float64[np.ndarray, " width"]:
    """`Delta_f` for every feature: from -1, fires on negative documents alone, to 1, on positive ones alone."""
    positive = np.bincount(data.feature[labels[data.item]], minlength=data.width)
    return positive / labels.sum() - (data.counts() - positive) / (~labels).sum()


def layer_differences(seeds: Labelled) -> dict[int, float]:
    """Per layer its top-1 difference, the largest `Delta_f`: layers are ranked by it without any test data."""
    return {layer: float(deltas(data, seeds.labels).max()) for layer, data in seeds.layers.items()}


def fit_rule(
    seeds: Labelled,
    k: int | None = None,
    *,
    layer: int | None = None,
    several: int = 1,
    weighted: bool = False,
    name: str = "rule",
) -> Rule:
    """The rule of the top `k` features of a layer; with `several` layers, of the best feature of each.

    Args:
        k: by default 2, of which an OR seldom calls too much positive, or 16 with weights.
        layer: by default the one with the largest top-1 difference.
        several: above 1, a rule over this many layers, those with the largest top-1 differences; `k` is not used.
        weighted: weigh the features in place of joining them by OR, the `k` whose mean largest activations differ most
            between the classes.

    Raises:
        InputError: more features or layers than there are, a layer that is not among them, or several with weights.
    """
    differences = layer_differences(seeds)
    ranked = sorted(differences, key=lambda where: (-differences[where], where))
    check_count("the number of layers of a rule", several, 1, len(ranked))
    if layer is not None and layer not in seeds.layers:
        raise InputError(f"the seeds have no layer {layer}; they have {sorted(seeds.layers)}")
    width = min(data.width for data in seeds.layers.values())
    k = min(16 if weighted else 2, width) if k is None else k
    check_count("the number of features of a rule", k, 1, width)
    if weighted:
        if several > 1:
            raise InputError("weights are for the features of one layer, those of several are joined by OR")
        return weighted_rule(seeds, ranked[0] if layer is None else layer, k, name)
    where = ranked[:several] if several > 1 else [ranked[0] if layer is None else layer]
    features = []
    for one in where:
        data = seeds.layers[one]
        delta = deltas(data, seeds.labels)
        top = np.lexsort((np.arange(len(delta)), -delta))[: 1 if several > 1 else k]
        features += [rule_feature(data, seeds.labels, int(f), float(delta[f])) for f in top]
    return Rule(name, tuple(features), about_seeds(seeds, len(features)))


def about_seeds(seeds: Labelled, k: int) -> dict[str, Any]:
    """What a rule keeps of how it was made."""
    positive = int(seeds.labels.sum())
    return {"seeds": {"positive": positive, "negative": len(seeds) - positive}, "k": k}


def weighted_rule(seeds: Labelled, layer: int, k: int, name: str) -> Rule:
    """Logistic regression (L2, C = 1) on the largest activations of the `k` features whose class means differ most.

    All activations are divided by one number, which makes the mean squared length of a centred row `k`, as
    standardising would: dividing each feature by its own spread would make the rarest ones the longest.
    """
    from sklearn.linear_model import LogisticRegression

    data, labels = seeds.layers[layer], seeds.labels
    most = data.matrix(values=True)
    apart = np.abs(np.subtract(*(np.asarray(most[side].mean(0)).ravel() for side in (labels, ~labels))))
    top = np.lexsort((np.arange(len(apart)), -apart))[:k]
    x = most[:, top].toarray().astype(np.float64)
    mean = x.mean(0)
    unit = np.sqrt(k) / max(float(np.sqrt(((x - mean) ** 2).sum(1).mean())), 1e-12)
    model = LogisticRegression(max_iter=2000).fit((x - mean) * unit, labels)
    weights, delta = model.coef_[0] * unit, deltas(data, labels)
    features = []
    for f, weight, values in zip(top, weights, x.T, strict=True):
        scale = float(values.max()) or 1.0
        features.append(RuleFeature(layer, int(f), 0.0, scale, float(delta[f]), data.sae, float(weight * scale)))
    return Rule(name, tuple(features), about_seeds(seeds, k), float(model.intercept_[0] - weights @ mean))


def rule_feature(data: Dataset, labels: Bool[np.ndarray, " items"], feature: int, delta: float) -> RuleFeature:
    """A feature as a rule has it, with the threshold 0 of the report."""
    values = data.value[(data.feature == feature) & labels[data.item]]
    return RuleFeature(data.layer, feature, 0.0, float(values.max()) if len(values) else 1.0, delta, data.sae)


def noise_test(seeds: Labelled, shuffles: int = 200, seed: int = 0) -> Permuted:
    """The largest `Delta_f` of all features and layers beside what it is under shuffled labels.

    The best of many features looks good by chance; under shuffled labels there is nothing but chance. A p-value above
    `NOISE` says that the labels may be noise.
    """
    check_count("shuffles", shuffles)
    labels = seeds.labels
    rng = np.random.default_rng(seed)
    mixed = np.stack([rng.permutation(labels) for _ in range(shuffles)], 1)
    weights = np.where(mixed, 1 / labels.sum(), -1 / (~labels).sum()).astype(np.float32)
    each = np.full(shuffles, -np.inf)
    for data in seeds.layers.values():
        each = np.maximum(each, np.asarray(data.matrix().T @ weights).max(0))
    # Products in fp32 end a little off the exact shares; the real labels get the same arithmetic.
    own = np.where(labels, 1 / labels.sum(), -1 / (~labels).sum()).astype(np.float32)
    found = max(float(np.asarray(data.matrix().T @ own).max()) for data in seeds.layers.values())
    return permuted(found, each.astype(np.float64))


def evaluate(rule: Rule, test: Labelled, fixed_fpr: float = 0.01, seed: int = 0) -> Rates:
    """How well a rule does on labelled documents."""
    return rates(rule.decide(test.layers), test.labels, rule.scores(test.layers), fixed_fpr=fixed_fpr, seed=seed)


def f1(rule: Rule, test: Labelled) -> float:
    """F1 alone."""
    called, labels = rule.decide(test.layers), test.labels
    return float(2 * (called & labels).sum() / max(1, called.sum() + labels.sum()))


def data_efficiency(
    seeds: Labelled,
    test: Labelled,
    sizes: Sequence[int],
    k: int | None = None,
    repeats: int = 10,
    seed: int = 0,
    *,
    weighted: bool = False,
) -> Float64[np.ndarray, "sizes repeats"]:
    """F1 on `test` of rules (as `fit_rule` takes `k` and `weighted`) from random subsets of so many documents a class.

    Raises:
        InputError: a size larger than a class.
    """
    positive, negative = np.flatnonzero(seeds.labels), np.flatnonzero(~seeds.labels)
    check_count("repeats", repeats)
    check_count("a number of seeds per class", max(sizes), 1, min(len(positive), len(negative)))
    check_count("a number of seeds per class", min(sizes), 1, max(sizes))
    rng, out = np.random.default_rng(seed), np.empty((len(sizes), repeats))
    for i, size in enumerate(sizes):
        for j in range(repeats):
            chosen = [rng.choice(some, size, replace=False) for some in (positive, negative)]
            some = seeds.take(np.sort(np.concatenate(chosen)))
            out[i, j] = f1(fit_rule(some, k, weighted=weighted), test)
    return out


def transfer(
    seeds: Mapping[str, Labelled], tests: Mapping[str, Labelled], k: int = 2
) -> Float64[np.ndarray, "from to"]:
    """F1 of the rule found in one language (row) on the documents of another (column), in the order of the mappings."""
    found = [fit_rule(some, k) for some in seeds.values()]
    return np.array([[f1(rule, test) for test in tests.values()] for rule in found])


def shared_features(seeds: Mapping[str, Labelled], layer: int, k: int = 10) -> Float64[np.ndarray, "n n"]:
    """Jaccard similarity of the top `k` features of each pair of languages at a layer."""
    check_count("k", k)
    tops = [set(np.argsort(-deltas(some.layers[layer], some.labels), kind="stable")[:k]) for some in seeds.values()]
    return np.array([[len(a & b) / len(a | b) for b in tops] for a in tops])


def joined(name: str, parts: Sequence[Dataset]) -> Dataset:
    """Datasets one after the other as one; ids get the name of their part in front.

    Raises:
        MismatchError: parts of different SAEs, layers or reductions.
    """
    first = parts[0]
    if any(
        (p.sae, p.layer, p.width, p.reduction) != (first.sae, first.layer, first.width, first.reduction) for p in parts
    ):
        raise MismatchError(f"the parts of {name} are firings of different SAEs, layers or reductions")
    starts = np.cumsum([0, *(len(p) for p in parts[:-1])])
    item = np.concatenate([p.item + s for p, s in zip(parts, starts, strict=True)]).astype(np.int32)
    texts = [p.texts for p in parts]
    return replace(
        first,
        name=name,
        ids=tuple(f"{p.name}/{i}" for p in parts for i in p.ids),
        item=item,
        feature=np.concatenate([p.feature for p in parts]),
        value=np.concatenate([p.value for p in parts]),
        position=np.concatenate([p.position for p in parts]),
        scores=None,
        texts=None if any(t is None for t in texts) else tuple(text for some in texts if some for text in some),
    )

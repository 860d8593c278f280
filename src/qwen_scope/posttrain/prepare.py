"""Find the features of a target group, and what they are on every other group: the alpha table."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import Float64

from qwen_scope.errors import InputError, NotFoundError, nearest
from qwen_scope.features import Pooled, language_features, pool_texts
from qwen_scope.model import HookPoint, by_length, capture
from qwen_scope.scope import Scope

from .table import AlphaTable, LayerTable

BATCH_TOKENS = 4096
OWN_TOKEN = 0.99
"""A token is the target's own if, with every group weighted alike, so much of its use is in the target's texts."""

Say = Callable[[str, float], None]


def prepare(
    scope: Scope,
    labelled: Sequence[tuple[str, str]],
    target: str,
    *,
    layers: Sequence[int] | None = None,
    features: int = 2,
    at_random: int | None = None,
    say: Say | None = None,
) -> AlphaTable:
    """The alpha table of a target group, from texts with the names of their groups.

    A feature's score is its mean activation on the target less the mean of the other groups' means; the first token of
    a text does not count (SASFT, arXiv 2507.14894, whose authors take the top two of each of the last two layers, from
    100 sentences per group). Alpha is a feature's mean *pre-activation* on a group.

    Args:
        labelled: pairs of group and text; at least two groups. Any labels will do: languages, styles, topics.
        target: the group whose features are wanted.
        layers: by default the last two that have an SAE.
        features: how many of each layer.
        at_random: a seed that draws features instead, among those that fire at all in these texts and are not
            among the chosen: the control.
        say: called with what is being done and its share done, 0 to 1.

    Raises:
        InputError: fewer than two groups, a group without a second token, or too few features.
        NotFoundError: a target that no text has, or a layer without an SAE.
    """
    groups = sorted({group for group, _ in labelled})
    if target not in groups:
        raise NotFoundError(f"no text belongs to the target {target!r}; {nearest(target, groups) if groups else ''}")
    if len(groups) < 2:
        raise InputError(f"every text belongs to {target!r}; a score needs texts of other groups to compare with")
    if features < 1:
        raise InputError(f"choose at least one feature per layer, not {features}")
    wanted = scope.check_layers(scope.layers[-2:] if layers is None else layers)
    report = say or (lambda stage, share: None)
    texts = {group: [text for other, text in labelled if other == group] for group in groups}
    pooled: dict[str, dict[int, Pooled]] = {}
    for i, group in enumerate(groups):
        pooled[group] = pool_texts(scope, texts[group], wanted, skip_first=True)
        report("scores", (i + 1) / len(groups))
    best = [one for one in language_features(pooled, features) if one.language == target]
    chosen = {layer: [one.feature for one in best if one.layer == layer] for layer in wanted}
    if at_random is not None:
        chosen = {layer: drawn(pooled, layer, chosen[layer], at_random) for layer in wanted}
    alpha: dict[str, dict[int, Float64[np.ndarray, " features"]]] = {}
    for i, group in enumerate(groups):
        alpha[group] = mean_pre_acts(scope, texts[group], chosen)
        report("alpha", (i + 1) / len(groups))
    tables = []
    for layer, found in chosen.items():
        scores = tuple(score(pooled, target, layer, feature) for feature in found)
        numbers = {group: tuple(map(float, alpha[group][layer])) for group in groups}
        tables.append(LayerTable(layer, scope.saes[layer].identity, tuple(found), scores, numbers))
    made = {
        "model": scope.name,
        "texts": dict(Counter(group for group, _ in labelled)),
        "features": "at random" if at_random is not None else "by score",
        "versions": versions(),
    }
    return AlphaTable(target, tuple(tables), own_tokens(scope, texts, target), made)


def score(pooled: Mapping[str, Mapping[int, Pooled]], target: str, layer: int, feature: int) -> float:
    """The mean activation of a feature on the target less the mean of the other groups' means."""
    means = {
        group: float(found[layer].total[:, [feature]].sum()) / int(found[layer].tokens.sum())
        for group, found in pooled.items()
    }
    return means[target] - float(np.mean([mean for group, mean in means.items() if group != target]))


def drawn(pooled: Mapping[str, Mapping[int, Pooled]], layer: int, best: Sequence[int], seed: int) -> list[int]:
    """As many other features of a layer, at random among those that fire in any of the texts."""
    firing = np.unique(np.concatenate([found[layer].firing() for found in pooled.values()]))
    pool = np.setdiff1d(firing, best)
    if len(pool) < len(best):
        raise InputError(f"only {len(pool)} other features of layer {layer} fire here; {len(best)} are wanted")
    return sorted(map(int, np.random.default_rng([seed, layer]).choice(pool, len(best), replace=False)))


def mean_pre_acts(
    scope: Scope, texts: Sequence[str], features: Mapping[int, Sequence[int]]
) -> dict[int, Float64[np.ndarray, " features"]]:
    """Per layer the mean pre-activation of some features over the tokens of texts, first tokens left out."""
    tokens = scope.tokenize(texts, truncate=True)
    sums = {layer: np.zeros(len(chosen)) for layer, chosen in features.items()}
    counted = tokens.attention_mask.bool().clone()
    counted[:, 0] = False
    for rows in by_length(tokens.lengths, BATCH_TOKENS):
        seq = max(tokens.lengths[i] for i in rows)
        ids, mask = tokens.input_ids[rows, :seq], tokens.attention_mask[rows, :seq]
        residuals = capture(scope.model, ids, [HookPoint(layer) for layer in features], mask)
        for point, h in residuals.items():
            kept = h[counted[rows, :seq].to(h.device)]
            pre = scope.saes[point.layer].pre_acts(kept, list(features[point.layer]))
            sums[point.layer] += pre.double().sum(0).cpu().numpy()
    return {layer: total / int(counted.sum()) for layer, total in sums.items()}


def own_tokens(scope: Scope, texts: Mapping[str, Sequence[str]], target: str) -> tuple[int, ...]:
    """The tokens that are used almost only in the target's texts, every group weighted alike."""
    shares = {}
    for group, some in texts.items():
        tokens = scope.tokenize(some, truncate=True)
        used = tokens.input_ids[tokens.attention_mask.bool()].numpy()
        shares[group] = np.bincount(used, minlength=len(scope.tokenizer)) / len(used)
    total = np.sum(list(shares.values()), axis=0)
    return tuple(np.flatnonzero((total > 0) & (shares[target] >= OWN_TOKEN * total)).tolist())


def versions() -> dict[str, Any]:
    """Of Python and of the packages that decide a run."""
    names = ("qwen-scope", "torch", "transformers", "trl", "peft", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}

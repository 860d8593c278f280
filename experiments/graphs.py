"""What experiments on attribution graphs measure on one prompt, whatever the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qwen_scope.circuits import Place, Reading, ablated, effects, faithfulness
from qwen_scope.circuits.explain import agree
from qwen_scope.circuits.options import check_method

TOP, STRONGEST, MATCHED = 50, 5, 20
SIZES = tuple(sorted({round(2 ** (k / 2)) for k in range(21)}))
"""Numbers of features at which faithfulness is measured."""
NEVER = 10**9
"""In the place of a number of features where no size is enough."""


def flat(reading: Reading, by_layer: Mapping[int, torch.Tensor]) -> tuple[list[Place], np.ndarray]:
    """Places and a number of each, over all layers."""
    places: list[Place] = []
    for layer in reading.layers:
        one = reading.active[layer]
        places += [Place(layer, p, f) for p, f in zip(one.positions.tolist(), one.features.tolist(), strict=True)]
    return places, torch.cat([by_layer[layer] for layer in reading.layers]).numpy()


def estimates(reading: Reading, method: str) -> tuple[list[Place], np.ndarray]:
    """Every active feature and its effect by a method."""
    return flat(reading, effects(reading, check_method(method)).features)


def activations(reading: Reading) -> np.ndarray:
    """Of every active feature, in the order of `flat`."""
    return flat(reading, {layer: reading.active[layer].values for layer in reading.layers})[1]


def agreement(reading: Reading, places: Sequence[Place], estimated: np.ndarray) -> tuple[float, float] | None:
    """Pearson and Spearman correlation with exact ablation, over the features with the largest estimates."""
    top = np.argsort(-np.abs(estimated))[:TOP]
    exact = ablated(reading, [[places[n]] for n in top]).tolist()
    return agree(estimated[top].tolist(), exact)


def matched(
    reading: Reading, places: Sequence[Place], effect: np.ndarray, activation: np.ndarray, seed: int
) -> dict[str, Any]:
    """What ablating the strongest lowers, against sets of features like them that are active in the prompt."""
    rng = np.random.default_rng(seed)
    rates = {layer: np.asarray(reading.scope.stats[layer].firing_rate) for layer in reading.layers}
    size = np.stack([np.log(activation), np.log([rates[p.layer][p.feature or 0] + 1e-6 for p in places])])
    size = size / size.std(1, keepdims=True)
    layers = np.array([one.layer for one in places])
    top = np.argsort(-effect)[:STRONGEST]
    sets: list[list[Place]] = [[places[n] for n in top]]
    alike = []
    for n in top:
        others = [m for m in np.flatnonzero(layers == layers[n]) if m not in top]
        near = np.argsort(((size[:, others] - size[:, [n]]) ** 2).sum(0))[:MATCHED]
        alike.append(rng.permutation([others[m] for m in near]))
    sets += [[places[one[k]] for one in alike] for k in range(min(map(len, alike)))]
    lowered = ablated(reading, sets).tolist()
    return {"lowered": lowered[0], "by_matched": lowered[1:], "beats": lowered[0] > max(lowered[1:])}


def half(reading: Reading, places: Sequence[Place], order: Sequence[int] | np.ndarray) -> int | None:
    """The smallest of `SIZES` at which half the faithfulness is reached; None where none of them does.

    Zero ablation, errors kept. Larger sizes are not run once one is enough.
    """
    sizes = [n for n in SIZES if n <= len(order)] + [len(order)]
    for start in range(0, len(sizes), 6):
        some = sizes[start : start + 6]
        found = faithfulness(reading, [[places[i] for i in order[:n]] for n in some])
        for n, one in zip(some, found, strict=True):
            if one.faithfulness >= 0.5:
                return n
    return None


def median_ratio(rows: Iterable[Mapping[str, int | None]], one: str, other: str) -> float:
    """The median over prompts of how many features one ranking needs, over how many another does."""
    return float(np.median([(row[one] or NEVER) / (row[other] or NEVER) for row in rows]))


def median_size(rows: Iterable[Mapping[str, int | None]], name: str) -> str:
    """The median number of features of a ranking; those that were never enough are said."""
    number = float(np.median([row[name] or NEVER for row in rows]))
    return "more than there are" if number >= NEVER else f"{number:g}"

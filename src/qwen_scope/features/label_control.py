"""The control of labels: what labels of other features tell of one, on the contexts that its own is tested on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from qwen_scope.stats import Interval, resample
from qwen_scope.store import FeatureStore

from .judges import Judge
from .label import mean_of_means
from .label_entry import Label
from .label_options import LabelOptions
from .material import Material, material

OTHERS = 10
"""Labels of other features that stand for random ones."""


def random_detection(given: Material, judge: Judge, others: Sequence[str]) -> Interval:
    """Balanced accuracy of detection by labels of other features, their mean over labels, with a bootstrap interval.

    As `scored_label` scores a feature's own label, on the same contexts; 0.5 is chance. An answer that a judge does not
    give counts as wrong by half.
    """
    texts = [*given.firing, *given.silent]
    answers = np.array([[0.5 if one is None else float(one) for one in judge.detect(text, texts)] for text in others])
    said = answers.mean(0)
    n = len(given.firing)
    return resample(said[:n], 1 - said[n:], mean_of_means)


def beside_others(
    label: Label, given: Material, judge: Judge, others: Sequence[str], n: int, rng: np.random.Generator
) -> Label:
    """A label with the detection of `n` drawn labels of other features beside its own, on the contexts that test it."""
    drawn: list[int] = rng.permutation(len(others))[:n].tolist()
    return replace(label, random=random_detection(given, judge, [others[i] for i in drawn]))


def with_random(
    store: FeatureStore,
    labels: Mapping[tuple[int, int], Label],
    judge: Judge,
    options: LabelOptions | None = None,
    n: int = OTHERS,
) -> dict[tuple[int, int], Label]:
    """Labels of a store with the detection of `n` labels of other features of the same layer beside their own.

    Args:
        options: those that the labels were made with, so that the contexts are the same.
    """
    out = {}
    for place, label in labels.items():
        others = [one.text for at, one in labels.items() if at[0] == place[0] and one.text != label.text]
        if len(others) >= n:
            rng = np.random.default_rng((options or LabelOptions()).seed + place[1])
            out[place] = beside_others(label, material(store, *place, options), judge, others, n, rng)
        else:
            out[place] = label
    return out

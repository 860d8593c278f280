"""The control of labels: what labels of other features tell of one, on the contexts that its own is tested on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from qwen_scope.stats import Interval, resample
from qwen_scope.store import FeatureStore

from .judges import Judge
from .label import mean_of_means
from .label_options import LabelOptions
from .material import Material, material
from .notes import Label

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
            drawn = np.random.default_rng((options or LabelOptions()).seed + place[1]).permutation(len(others))[:n]
            given = material(store, *place, options)
            out[place] = replace(label, random=random_detection(given, judge, [others[i] for i in drawn]))
        else:
            out[place] = label
    return out

"""Figures of several seeds on several prompts each, with one interval over both."""

from __future__ import annotations

import numpy as np

from qwen_scope.stats import Interval

RESAMPLES = 4000


def over_seeds(values: np.ndarray, *, same: bool = False) -> Interval:
    """The mean with its 95% interval over seeds and prompts: seeds are resampled, and within each its prompts.

    Args:
        values: `(seeds, prompts)`.
        same: the seeds share their prompts, so a resample draws one set of them for all its seeds.
    """
    rng, (seeds, prompts) = np.random.default_rng(0), values.shape
    if same:
        drawn, some = rng.integers(seeds, size=(RESAMPLES, seeds)), rng.integers(prompts, size=(RESAMPLES, prompts))
        means = values[drawn[:, :, None], some[:, None]].mean((1, 2))
    else:
        means = []
        for _ in range(RESAMPLES):
            drawn = rng.integers(seeds, size=seeds)
            means.append(np.mean([values[i, rng.integers(prompts, size=prompts)].mean() for i in drawn]))
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high), values.size)

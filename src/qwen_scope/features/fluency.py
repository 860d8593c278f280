"""What a change costs in fluency: perplexity under the unsteered model, as a multiple, with an interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from qwen_scope.errors import InputError
from qwen_scope.stats import LEVEL, RESAMPLES, Interval

LogProbabilities = Sequence[Float[np.ndarray, " _"]]
"""Per text the log-probability of each of its tokens, in nats."""


def perplexity_ratio(
    steered: LogProbabilities, reference: LogProbabilities, *, paired: bool, seed: int = 0
) -> Interval:
    """The perplexity of one list of texts over that of another, over all their tokens, with a bootstrap interval.

    Args:
        paired: the two are continuations of the same prompts in the same order, and prompts are resampled; else the
            texts of each list are.

    Raises:
        InputError: a list without a token.
    """
    a, b = (_sums(texts) for texts in (steered, reference))
    if not a[1].any() or not b[1].any():
        which = "changed" if not a[1].any() else "unsteered"
        raise InputError(f"the {which} continuations hold no token, so fluency can't be judged; try other prompts")
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(a[0]), (RESAMPLES, len(a[0])))
    others = rows if paired else rng.integers(0, len(b[0]), (RESAMPLES, len(b[0])))
    drawn = np.exp(_mean(b, others) - _mean(a, rows))
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    found = float(np.exp(b[0].sum() / b[1].sum() - a[0].sum() / a[1].sum()))
    return Interval(found, float(low), float(high), min(len(a[0]), len(b[0])))


def _sums(texts: LogProbabilities) -> tuple[np.ndarray, np.ndarray]:
    """Per text the sum of its log-probabilities, and its tokens."""
    return np.array([float(one.sum()) for one in texts]), np.array([float(len(one)) for one in texts])


def _mean(of: tuple[np.ndarray, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Per draw the mean over its tokens; NaN for a draw without a token."""
    total, tokens = (one[rows].sum(-1) for one in of)
    return np.divide(total, tokens, out=np.full_like(total, np.nan), where=tokens > 0)

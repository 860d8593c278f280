"""Whether a feature and a description belong together: the four measures of FADE (Puri et al. 2025, arXiv 2502.16994).

There a judge model writes texts of the concept and rates others. Here the rating is whatever tells which documents have
the concept, such as a column of their metadata. An activation of a document is the largest of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from qwen_scope.errors import InputError
from qwen_scope.stats import auroc

Activations = Float[np.ndarray, "_"]  # anonymous: groups differ in size


def gini(concept: Activations, others: Activations) -> float:
    """`|2 AUROC - 1|`: 0 where activations do not tell the two apart, 1 where they do without fault.

    Raises:
        InputError: an empty group.
    """
    return float(abs(2 * auroc(concept, others) - 1))


def clarity(written: Activations, natural: Activations) -> float:
    """The Gini index of texts written for the concept against natural ones: does the concept alone activate it?"""
    return gini(written, natural)


def responsiveness(concept: Activations, others: Activations) -> float:
    """The Gini index of natural texts with the concept against those without: does it respond to the concept?"""
    return gini(concept, others)


def purity(concept: Activations, others: Activations) -> float:
    """The average precision of calling texts by their activation: does it respond to the concept alone?

    `sum (R_i - R_(i-1)) P_i` over the distinct activations, strongest first. A feature that falls silent on the concept
    is read with its sign turned, as there.

    Raises:
        InputError: an empty group.
    """
    values = np.concatenate([concept, others]).astype(np.float64)
    y = np.repeat([1.0, 0.0], [len(concept), len(others)])
    if float(auroc(concept, others)) < 0.5:
        values = -values
    order = np.argsort(-values, kind="stable")
    last = np.append(np.diff(values[order]) != 0, True)  # where a run of equal activations ends
    hits, called = np.cumsum(y[order])[last], np.arange(1, len(y) + 1)[last]
    recall = hits / len(concept)
    return float((np.diff(recall, prepend=0.0) * hits / called).sum())


def faithfulness(shares: Sequence[float], unsteered: float) -> float:
    """How far steering raises the share of generated texts with the concept.

    `max(max(shares) - unsteered, 0) / (1 - unsteered)`.

    Args:
        shares: of texts with the concept, one per dose.   unsteered: the same without steering.

    Raises:
        InputError: no dose, or a share outside [0, 1].
    """
    if not len(shares) or not all(0 <= one <= 1 for one in (*shares, unsteered)):
        raise InputError(f"faithfulness takes shares between 0 and 1, not {list(shares)} and {unsteered}")
    return 0.0 if unsteered == 1 else max(max(shares) - unsteered, 0.0) / (1 - unsteered)

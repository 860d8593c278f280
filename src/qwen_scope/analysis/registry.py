"""The analyses. One line here gives a new one its command, its tables, its figures and its contract test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .coverage import subset_of
from .drift import drift_of
from .groups import clusters_of
from .overlap import overlap_of
from .redundancy import redundancy_of
from .result import Result


@dataclass(frozen=True)
class Analysis:
    """An analysis as commands see it.

    Attributes:
        run: takes the datasets, and keyword options that are `Annotated` with their help; returns a `Result`.
        reduction: how the tokens of an item are reduced, unless a user says otherwise.
        datasets: the least number.
        texts: it shows documents, so their texts are read too, and the labels of features.
    """

    run: Callable[..., Result]
    reduction: str = "last"
    datasets: int = 1
    texts: bool = False


ANALYSES: dict[str, Analysis] = {
    "redundancy": Analysis(redundancy_of),
    "overlap": Analysis(overlap_of, datasets=2),
    "subset": Analysis(subset_of),
    "drift": Analysis(drift_of, reduction="max", datasets=2, texts=True),
    "clusters": Analysis(clusters_of, reduction="mean", texts=True),
}

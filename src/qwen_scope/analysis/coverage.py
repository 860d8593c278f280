"""A few items that keep most of a dataset's footprint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from qwen_scope.errors import check_count
from qwen_scope.report import Curves, Line, thinned
from qwen_scope.stats import kendall

from .dataset import Dataset, check_together
from .items import greedy
from .redundancy import expected_coverage
from .result import Result, Table


def subset_of(
    datasets: Sequence[Dataset],
    *,
    share: Annotated[float, "The share of the footprint to keep."] = 0.95,
    draws: Annotated[int, "Random subsets of the same size to compare rankings with."] = 200,
    seed: Annotated[int, "Of the random subsets."] = 0,
) -> Result:
    """The few items that keep a share of the footprint; with scores, whether they still rank the models.

    Raises:
        InputError, MismatchError: a share that makes no sense, or datasets that do not belong together.
    """
    check_together(datasets)
    check_count("--draws", draws)
    data: dict[str, Any] = {}
    rows, lines, per_item = [], [], []
    for dataset in datasets:
        chosen, gains = greedy(dataset, share)
        exact = expected_coverage(dataset.counts(), len(dataset))
        n = len(chosen)
        kept = np.cumsum(gains) / exact.footprint
        one: dict[str, Any] = {
            "items": len(dataset),
            "chosen": n,
            "ids": [dataset.ids[i] for i in chosen],
            "share": float(kept[-1]),
            "random_share": float(exact.curve[n - 1]),
            "random_needs": int(np.searchsorted(exact.curve, kept[-1] - 1e-12)) + 1,
        }
        row: tuple = (dataset.name, len(dataset), n, one["share"], one["random_share"], one["random_needs"])
        if dataset.scores is not None:
            one["kendall"] = tau = kept_ranking(dataset, chosen, draws, seed)
            row += (tau["chosen"], f"{tau['random']:.3f} ({tau['low']:.3f} to {tau['high']:.3f})")
        data[dataset.name] = one
        rows.append(row)
        place = {item: step + 1 for step, item in enumerate(chosen)}
        per_item += [(dataset.name, dataset.ids[i], i in place, place.get(i)) for i in range(len(dataset))]
        at = thinned(n)
        lines.append(Line(dataset.name, [i + 1 for i in at], kept[at].tolist()))
    scored = all(d.scores is not None for d in datasets)
    columns = ("dataset", "items", "chosen", "share kept", "random items keep", "random items needed")
    columns += ("Kendall tau", "of random subsets") if scored else ()
    tables = (Table(f"Subsets that keep {share:.0%} of the footprint", columns, [r[: len(columns)] for r in rows]),)
    drawn = Curves("Footprint kept by greedy choice", "items", "share", lines, log_x=True)
    said = "; ".join(
        f"{one['chosen']} of {one['items']} items of {name} keep {one['share']:.0%} of its features,"
        f" where random choice needs {one['random_needs']}"
        for name, one in data.items()
    )
    items = Table("Items", ("dataset", "id", "chosen", "order"), per_item)
    return Result(data, tables, (drawn,), verdict=f"{said}.", items=items)


def kept_ranking(dataset: Dataset, chosen: Sequence[int], draws: int, seed: int) -> dict[str, float]:
    """Kendall's tau between the chosen items and all of them, and between random subsets of that size and all."""
    assert dataset.scores is not None
    values, rng = dataset.scores.values, np.random.default_rng(seed)
    parts = [np.asarray(chosen), *(rng.choice(len(values), len(chosen), replace=False) for _ in range(draws))]
    tau = kendall(values.mean(0).round(9), np.stack([values[part].mean(0) for part in parts]).round(9))
    low, middle, high = np.quantile(tau[1:], [0.025, 0.5, 0.975]) if draws else [math.nan] * 3
    return {"chosen": float(tau[0]), "random": float(middle), "low": float(low), "high": float(high)}

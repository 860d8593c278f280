"""Which benchmarks exercise the same features, and whether models rank alike on those that do.

Definitions are those of the Qwen-Scope report (arXiv 2605.11887, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float64

from qwen_scope.errors import InputError, check_share
from qwen_scope.report import Figure, Heatmap
from qwen_scope.stats import pair_correlation, partial

from .dataset import Dataset, check_together
from .result import Result, Table

FEWEST = 4  # datasets, for a correlation over their pairs
LEVEL = 0.05  # a smaller p-value is taken for a correlation


def overlaps(datasets: Sequence[Dataset]) -> tuple[Float64[np.ndarray, "n n"], Float64[np.ndarray, "n n"]]:
    """Of footprints F: `|F_i n F_j| / |F_i|`, the share of i that j covers, and `|F_i n F_j| / min(|F_i|, |F_j|)`.

    Raises:
        InputError: a dataset on which no feature fires.
    """
    fired = np.stack([d.counts() > 0 for d in datasets]).astype(np.float64)
    size = fired.sum(1)
    if (size == 0).any():
        raise InputError(f"no feature fires on any item of {datasets[int(size.argmin())].name}")
    both = fired @ fired.T
    return both / size[:, None], both / np.minimum(size[:, None], size)


def clusters(similar: Float64[np.ndarray, "n n"], cut: float) -> tuple[list[int], list[int]]:
    """Average linkage on `1 - similarity`: an order in which like stand together, and a cluster for each, from 1.

    Args:
        cut: members of one cluster are on average at least so similar.
    """
    check_share("the cut of a cluster", cut, zero=True)
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
    from scipy.spatial.distance import squareform

    apart = np.clip(1 - similar, 0, None)
    np.fill_diagonal(apart, 0)
    tree = linkage(squareform(apart, checks=False), "average")
    # A hair of room, for sums that round.
    found = fcluster(tree, 1 - cut + 1e-9, "distance")
    return leaves_list(tree).tolist(), found.tolist()


def similarities(datasets: Sequence[Dataset]) -> Float64[np.ndarray, "n n"]:
    """Pearson correlations between the datasets' vectors of mean scores over the models.

    Raises:
        InputError: fewer than four models, or a dataset on which all score the same.
    """
    means = np.stack([d.scores.values.mean(0) for d in datasets if d.scores is not None])
    if means.shape[1] < 4:
        raise InputError(f"performance similarity needs at least 4 models, not {means.shape[1]}")
    flat = np.ptp(means, axis=1) == 0
    if flat.any():
        raise InputError(f"all models score the same on {datasets[int(flat.argmax())].name}, which says nothing")
    return np.clip(np.corrcoef(means), -1, 1)


def overlap_of(
    datasets: Sequence[Dataset],
    *,
    general: Annotated[str | None, "A benchmark of general ability, held fixed and left out of the pairs."] = None,
    cut: Annotated[float, "Members of a cluster overlap on average at least so much."] = 0.5,
    newcomer: Annotated[float, "Flag datasets whose largest overlap with another is below this."] = 0.3,
    seed: Annotated[int, "Of the intervals."] = 0,
) -> Result:
    """Which datasets share features, which stand alone; with scores, whether those that share rank models alike.

    Raises:
        InputError, MismatchError: fewer than two datasets, or some that do not belong together.
    """
    check_together(datasets, at_least=2)
    check_share("--cut", cut, zero=True)
    check_share("--newcomer", newcomer, zero=True)
    names = [d.name for d in datasets]
    if general is not None and general not in names:
        raise InputError(f"--general names {general!r}, which is none of {', '.join(names)}")
    covered, smaller = overlaps(datasets)
    order, found = clusters(smaller, cut)
    shown = [names[i] for i in order]
    largest = (smaller - 2 * np.eye(len(names))).max(1)
    rest = [covered_by_others(datasets, i) for i in range(len(names))]
    alone = [name for name, most in zip(names, largest, strict=True) if most < newcomer]
    rows = [
        (
            names[i],
            int((datasets[i].counts() > 0).sum()),
            found[i],
            float(largest[i]),
            rest[i],
        )
        for i in order
    ]
    columns = ("dataset", "footprint", "cluster", "largest overlap", "covered by all others", "stands alone")
    tables = [Table("Datasets", columns, [(*row, "yes" if row[0] in alone else None) for row in rows])]
    tables.append(
        Table(
            "Share of the row's footprint that the column covers",
            ("", *shown),
            [(names[i], *(float(covered[i, j]) for j in order)) for i in order],
        )
    )
    data: dict[str, Any] = {
        "datasets": names,
        "overlap": covered.tolist(),
        "overlap_min": smaller.tolist(),
        "clusters": dict(zip(names, found, strict=True)),
        "covered_by_others": dict(zip(names, rest, strict=True)),
        "stand_alone": alone,
    }
    grid = np.ix_(order, order)
    figures: list[Figure] = [
        Heatmap("Share of the row's footprint that the column covers", shown, shown, covered[grid], 0.0, 1.0),
        Heatmap("Overlap over the smaller footprint", shown, shown, smaller[grid], 0.0, 1.0),
    ]
    notes = [f"{name} shares little with the others: a newcomer to this suite" for name in alone]
    scored = all(d.scores is not None for d in datasets)
    if scored and len(datasets) - (general is not None) < FEWEST:
        notes.append(f"whether overlap goes with scores takes at least {FEWEST} datasets besides the one held fixed")
    elif scored:
        performance, table, figure = with_performance(datasets, smaller, general, seed)
        data["performance"] = performance
        tables.append(table)
        figures.append(figure)
        if min(one["p"] for one in performance.values()) > LEVEL:
            notes.append(f"overlap and scores are not shown to go together: no correlation has p at most {LEVEL:g}")
    apart = smaller - 2 * np.eye(len(names))
    i, j = np.unravel_index(int(apart.argmax()), apart.shape)
    n = len(set(found))
    spoken = (
        f"{len(names)} datasets in {n} cluster{'s' * (n != 1)}: {names[i]} and {names[j]} share most"
        f" ({apart[i, j]:.0%} of the smaller footprint), {len(alone)} stand{'s' * (len(alone) == 1)} alone."
    )
    return Result(
        data, tuple(tables), tuple(figures), tuple(notes), verdict=spoken, items=items_beside_others(datasets)
    )


def items_beside_others(datasets: Sequence[Dataset]) -> Table:
    """Per item, how many features fire on it, and how many of them fire in some other dataset too."""
    fired = np.stack([d.counts() > 0 for d in datasets])
    rows = []
    for i, dataset in enumerate(datasets):
        elsewhere = np.asarray(np.delete(fired, i, 0).any(0))
        features = np.bincount(dataset.item, minlength=len(dataset))
        held = np.bincount(dataset.item, elsewhere[dataset.feature], minlength=len(dataset)).astype(int)
        rows += [(dataset.name, *row) for row in zip(dataset.ids, features.tolist(), held.tolist(), strict=True)]
    return Table("Items", ("dataset", "id", "features", "in_other_datasets"), rows)


def covered_by_others(datasets: Sequence[Dataset], i: int) -> float:
    """The share of a footprint that all other datasets cover together; 0 where there are none."""
    own = datasets[i].counts() > 0
    others = np.zeros_like(own)
    for j, other in enumerate(datasets):
        if j != i:
            others |= other.counts() > 0
    return float((own & others).sum() / own.sum())


def with_performance(
    datasets: Sequence[Dataset], smaller: Float64[np.ndarray, "n n"], general: str | None, seed: int
) -> tuple[dict[str, Any], Table, Figure]:
    """How overlap and performance similarity go together over pairs: directly, and with one benchmark held fixed."""
    names = [d.name for d in datasets]
    similar = similarities(datasets)
    keep = [i for i, name in enumerate(names) if name != general]
    grid = np.ix_(keep, keep)
    measures = {"direct": similar[grid]}
    if general is not None:
        measures[f"with {general} held fixed"] = partial(similar[grid], similar[keep, names.index(general)])
    found, rows = {}, []
    for said, table in measures.items():
        for kind in ("pearson", "spearman"):
            one, p = pair_correlation(smaller[grid], table, kind, seed=seed)
            found[f"{said}, {kind}"] = {**asdict(one), "p": p, "pairs": len(keep) * (len(keep) - 1) // 2}
            rows.append((said, kind, one.estimate, f"{one.low:.3f} to {one.high:.3f}", p))
    columns = ("similarity of scores", "correlation", "with overlap", "95% interval", "p (Mantel)")
    figure = Heatmap("Correlation of scores over the models", names, names, similar)
    return found, Table("Overlap and performance", columns, rows), figure

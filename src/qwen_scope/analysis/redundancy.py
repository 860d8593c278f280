"""How much of a benchmark repeats itself: from its features alone, and from the scores of a panel of models.

Definitions and symbols are those of the Qwen-Scope report (arXiv 2605.11887, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float64, Int

from qwen_scope.errors import InputError, check_count
from qwen_scope.report import Curves, Figure, Line, Points, thinned
from qwen_scope.stats import Interval, bootstrap, correlation, kendall

from .dataset import Dataset, Scores, check_together
from .items import redundant_items
from .result import Result, Table

NEAR = 0.9
GRID = 40  # sizes of subsets on which Kendall's tau is measured; between them it is interpolated
Z = 1.959963984540054  # of a two-sided 95% interval


@dataclass(frozen=True, eq=False)
class Coverage:
    """How the footprint fills up as items are added.

    Attributes:
        items: N.   footprint: |F|, features that fire on some item.
        curve: `c_n` for n = 1 to N: the expected share of the footprint that n random items cover.
        auc: the mean of `c_n`.   redundancy: R-hat, the sum of `c_n` over |F|.
    """

    items: int
    footprint: int
    curve: Float64[np.ndarray, " items"]
    auc: float
    redundancy: float


def expected_coverage(counts: Int[np.ndarray, " features"], items: int) -> Coverage:
    """The exact curve, without sampling, in the time it takes to read the firings.

    `c_n = (1/|F|) sum_j [1 - C(N - m_j, n) / C(N, n)]` and `R-hat = (N + 1) / |F|^2 * sum_j m_j / (m_j + 1)`, where
    feature j fires on `m_j` of the N items: a random subset misses it with the hypergeometric chance of no hit.

    Args:
        counts: per feature, on how many items it fires.

    Raises:
        InputError: no feature fires.
    """
    m, features = np.unique(counts[counts > 0], return_counts=True)
    total = int(features.sum())
    if not total:
        raise InputError("no feature fires on any item, so there is no footprint")
    weights = features / total
    missed = np.ones(len(m))
    curve = np.empty(items)
    for n in range(1, items + 1):
        missed *= np.maximum(items - m - n + 1, 0) / (items - n + 1)
        curve[n - 1] = 1.0 - weights @ missed
    redundancy = float((items + 1) / total**2 * (features * m / (m + 1)).sum())
    return Coverage(items, total, curve, redundancy * total / items, redundancy)


def sampled_coverage(dataset: Dataset, draws: int, seed: int = 0) -> Float64[np.ndarray, "draws items"]:
    """The reference: per random order of the items, which share of the footprint the first n cover.

    Raises:
        InputError: no feature fires.
    """
    check_count("draws", draws)
    order = np.argsort(dataset.feature, kind="stable")
    features, start = np.unique(dataset.feature[order], return_index=True)
    if not len(features):
        raise InputError(f"no feature fires on any item of {dataset.name}")
    items = dataset.item[order]
    rng, n = np.random.default_rng(seed), len(dataset)
    found = np.empty((draws, n))
    for draw in range(draws):
        first = np.minimum.reduceat(rng.permutation(n).astype(np.int32)[items], start)
        found[draw] = np.cumsum(np.bincount(first, minlength=n)) / len(features)
    return found


def jackknife(dataset: Dataset) -> float:
    """The standard error of R-hat when the items are taken for a sample: leave one out, in closed form."""
    counts, n = dataset.counts(), len(dataset)
    if n < 3:
        return float("nan")
    m = counts[dataset.feature]
    # Without an item, each of its features fires once less, and one that fired there alone is gone.
    lost = np.bincount(dataset.item, m / (m + 1) - (m - 1) / m, minlength=n)
    alone = np.bincount(dataset.item, m == 1, minlength=n)
    total, fired = int((counts > 0).sum()), counts[counts > 0]
    left = np.maximum(total - alone, 1)
    redundancy = n / left**2 * ((fired / (fired + 1)).sum() - lost)
    return float(np.sqrt((n - 1) / n * ((redundancy - redundancy.mean()) ** 2).sum()))


@dataclass(frozen=True, eq=False)
class Ranking:
    """How soon a part of the benchmark ranks the models as the whole does.

    Attributes:
        sizes: numbers of items.   tau: Kendall's tau-b between part and whole, the mean over draws.
        low, high: the 2.5th and 97.5th percentile of single draws.
        redundancy: R, the mean of tau over all sizes 1 to N, with the interval of its mean over draws.
    """

    sizes: Int[np.ndarray, " sizes"]
    tau: Float64[np.ndarray, " sizes"]
    low: Float64[np.ndarray, " sizes"]
    high: Float64[np.ndarray, " sizes"]
    redundancy: Interval


def ranking(scores: Scores, draws: int = 100, seed: int = 0) -> Ranking:
    """Performance-based redundancy: `tau_n = E tau(p, p^(S))` over random S of n items, `R = (1/N) sum_n tau_n`.

    Sizes between the grid's are interpolated. A part on which all models tie ranks nothing and counts as 0.

    Raises:
        InputError: fewer than three models, or all of them score the same on the whole.
    """
    check_count("draws", draws)
    values, n = scores.values, len(scores.values)
    whole = values.mean(0)
    if len(whole) < 3 or np.ptp(whole) == 0:
        raise InputError(f"a ranking needs at least three models whose scores differ, not {len(whole)} models")
    sizes = np.unique(np.geomspace(1, n, GRID).round().astype(int))
    sizes = np.union1d(sizes, np.linspace(1, n, GRID).round().astype(int))
    rng = np.random.default_rng(seed)
    tau = np.empty((draws, len(sizes)))
    for draw in range(draws):
        part = np.cumsum(values[rng.permutation(n)], axis=0)[sizes - 1] / sizes[:, None]
        # Means of the same items added up in another order differ in the last digits, and tau would call that a rank.
        tau[draw] = kendall(whole.round(9), part.round(9))
    each = [float(np.interp(np.arange(1, n + 1), sizes, row).mean()) for row in tau]
    low, high = np.quantile(tau, [0.025, 0.975], axis=0)
    return Ranking(sizes, tau.mean(0), low, high, bootstrap(each, seed=seed))


def redundancy_of(
    datasets: Sequence[Dataset],
    *,
    draws: Annotated[int, "Random orders for the sampled reference and its band."] = 100,
    seed: Annotated[int, "Of the random orders."] = 0,
    near: Annotated[float, "Items whose features have at least this Jaccard similarity are twins."] = NEAR,
    shown: Annotated[int, "How many redundant items to list; --out has them all."] = 10,
) -> Result:
    """How much of each dataset repeats itself: footprint, coverage curve, R-hat; with scores also R.

    Redundant items are those without which the others still hold every feature, all of them left out at once.

    Raises:
        InputError, MismatchError: datasets that do not belong together, or without any firing.
    """
    check_together(datasets)
    check_count("--shown", shown, 0)
    if draws < 2:
        raise InputError(f"a band needs at least 2 random orders, not {draws}")
    rows, lines, taus, data = [], [], [], {}
    per_item = [row for dataset in datasets for row in redundant_items(dataset, near)]
    for dataset in datasets:
        exact = expected_coverage(dataset.counts(), len(dataset))
        sampled = sampled_coverage(dataset, draws, seed)
        reference = bootstrap(sampled.sum(1) / exact.footprint, seed=seed)
        error = jackknife(dataset)
        measured = None if dataset.scores is None else ranking(dataset.scores, draws, seed)
        lines.append(coverage_line(dataset.name, exact, sampled))
        one: dict[str, object] = {
            "items": exact.items,
            "footprint": exact.footprint,
            "auc": exact.auc,
            "redundancy": exact.redundancy,
            "low": exact.redundancy - Z * error,
            "high": exact.redundancy + Z * error,
            "sampled": asdict(reference),
            "coverage": [exact.curve[i] for i in thinned(len(dataset))],
            "coverage_at": [i + 1 for i in thinned(len(dataset))],
            "redundant": [row["id"] for row in per_item if row["dataset"] == dataset.name and row["redundant"]],
        }
        if measured is not None:
            one["ranking"] = asdict(measured.redundancy)
            taus.append(tau_line(dataset.name, measured))
        data[dataset.name] = one
        scored = () if measured is None else (measured.redundancy.estimate, str(measured.redundancy))
        band = f"{one['low']:.4g} to {one['high']:.4g}"
        rows.append((dataset.name, exact.items, exact.footprint, exact.auc, exact.redundancy, band, *scored))
    scored = all(d.scores is not None for d in datasets)
    if not scored:
        rows = [row[:6] for row in rows]
    columns = ("dataset", "items", "footprint", "AUC", "R-hat", "95% (jackknife)", "R", "95% (draws)")
    figures: list[Figure] = [Curves("Coverage of the footprint", "items", "share covered", lines)]
    tables = [Table("Redundancy", columns if scored else columns[:6], rows)]
    spoken, listed = said_of_items(datasets, per_item, near, shown)
    tables += listed
    if taus:
        figures.append(Curves("Agreement with the ranking by all items", "items", "Kendall tau", taus, log_x=True))
    if scored and len(datasets) >= 4:
        agreement, table, points = compared(data)
        data = {"datasets": data, "agreement": agreement}
        tables.append(table)
        figures.append(points)
    items = Table.of("Items", per_item)
    return Result(data, tuple(tables), tuple(figures), verdict=spoken, items=items)


def said_of_items(
    datasets: Sequence[Dataset], per_item: Sequence[dict[str, Any]], near: float, shown: int
) -> tuple[str, list[Table]]:
    """A sentence on the redundant items of each dataset, and a table of the first of them, those with a twin first."""
    said, rows = [], []
    for dataset in datasets:
        here = [row for row in per_item if row["dataset"] == dataset.name]
        spare = [row for row in here if row["redundant"]]
        twins = sum(row["twin"] is not None for row in here)
        said.append(
            f"{len(spare)} of {len(here)} items of {dataset.name} ({len(spare) / len(here):.0%}) are redundant:"
            f" the others hold every feature; {twins} have a twin (Jaccard at least {near:g})"
        )
        rows += sorted(spare, key=lambda row: -(row["similarity"] or 0.0))[:shown]
    table = Table.of("Redundant items, those with a twin first", rows)
    return f"{'. '.join(said)}.", [table] if rows else []


def compared(data: dict) -> tuple[dict, Table, Points]:
    """How R-hat and R agree over the datasets."""
    names = list(data)
    x = np.array([data[name]["redundancy"] for name in names])
    y = np.array([data[name]["ranking"]["estimate"] for name in names])
    size = np.array([float(data[name]["items"]) for name in names])
    pairs = {"R-hat and R": (x, y), "items and R": (size, y), "items and R-hat": (size, x)}
    found, rows = {}, []
    for said, (a, b) in pairs.items():
        one = correlation(a, b, "spearman")
        found[said] = asdict(one)
        rows.append((said, one.estimate, f"{one.low:.3f} to {one.high:.3f}", one.n))
    table = Table("Agreement over the datasets", ("Spearman correlation", "rho", "95% interval", "datasets"), rows)
    points = Points("Redundancy by features and by scores", "R-hat", "R", names, x.tolist(), y.tolist())
    return found, table, points


def coverage_line(name: str, exact: Coverage, sampled: Float64[np.ndarray, "draws items"]) -> Line:
    """The exact curve, and the band of single random orders."""
    at = thinned(exact.items)
    low, high = np.quantile(sampled[:, at], [0.025, 0.975], axis=0)
    return Line(name, [i + 1 for i in at], exact.curve[at].tolist(), low.tolist(), high.tolist())


def tau_line(name: str, found: Ranking) -> Line:
    """Kendall's tau by size."""
    return Line(name, found.sizes.tolist(), found.tau.tolist(), found.low.tolist(), found.high.tolist())

"""How two sets of texts differ in their features: train and test, two corpora, or one set of prompts on two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float64, Int
from scipy import stats

from qwen_scope.errors import InputError, MismatchError, check_count, check_share
from qwen_scope.report import Points
from qwen_scope.stats import Permuted, benjamini_hochberg, permuted, rate_difference

from .dataset import Dataset, check_together
from .near import near_duplicates
from .result import Result, Table

SHOWN = 20
BLOCK = 64  # shuffles at a time


def rate_tests(
    a: Int[np.ndarray, " width"], n_a: int, b: Int[np.ndarray, " width"], n_b: int
) -> Float64[np.ndarray, " width"]:
    """Fisher's exact test per feature: p-values of twice the smaller tail, for counts out of `n_a` and `n_b`."""
    low = stats.hypergeom.cdf(a, n_a + n_b, a + b, n_a)
    high = stats.hypergeom.sf(a - 1, n_a + n_b, a + b, n_a)
    return np.minimum(1.0, 2 * np.minimum(low, high))


def paired_tests(a: Dataset, b: Dataset) -> Float64[np.ndarray, " width"]:
    """McNemar's exact test per feature for the same items twice: whether it goes as often as it comes."""
    first, second = a.matrix(), b.matrix()
    both = np.asarray((first * second).sum(0)).ravel()
    gone, come = a.counts() - both, b.counts() - both
    low = stats.binom.cdf(np.minimum(gone, come), gone + come, 0.5)
    return np.where(gone + come > 0, np.minimum(1.0, 2 * low), 1.0)


def distance(a: Float64[np.ndarray, "... width"], b: Float64[np.ndarray, "... width"]) -> np.ndarray:
    """Between two vectors of firing rates: the sum of absolute differences over the sum of both.

    0 for equal rates, 1 where no feature fires in both: the Bray-Curtis dissimilarity of the rates.
    """
    return np.asarray(np.abs(a - b).sum(-1) / np.maximum((a + b).sum(-1), 1e-300))


def distance_test(a: Dataset, b: Dataset, shuffles: int, seed: int, paired: bool = False) -> Permuted:
    """The distance of the rates beside what it is when items change sides at random; pairs change sides together."""
    from scipy.sparse import vstack

    check_count("shuffles", shuffles)
    n_a, n_b = len(a), len(b)
    matrix = vstack([a.matrix(), b.matrix()]).tocsr().T.tocsr()
    total = a.counts() + b.counts()
    rng, found = np.random.default_rng(seed), []
    for start in range(0, shuffles, BLOCK):
        here = min(BLOCK, shuffles - start)
        sides = np.zeros((n_a + n_b, here), np.float32)
        for column in range(here):
            if paired:
                swap = rng.random(n_a) < 0.5
                sides[:n_a, column], sides[n_a:, column] = ~swap, swap
            else:
                sides[rng.permutation(n_a + n_b)[:n_a], column] = 1
        counts = (matrix @ sides).T.astype(np.float64)
        found.append(distance(counts / n_a, (total - counts) / n_b))
    return permuted(float(distance(a.rates(), b.rates())), np.concatenate(found) if found else np.zeros(0))


def drift_of(
    datasets: Sequence[Dataset],
    *,
    paired: Annotated[bool, "Both hold the same items in the same order, such as prompts on two checkpoints."] = False,
    level: Annotated[float, "The false-discovery rate of the features that are called different."] = 0.05,
    shuffles: Annotated[int, "Of the permutation test of the distance."] = 500,
    near: Annotated[float, "Warn of pairs whose sets of features have this Jaccard similarity."] = 0.9,
    examples: Annotated[int, "Example documents per feature."] = 3,
    seed: Annotated[int, "Of the shuffles."] = 0,
) -> Result:
    """Which features differ in rate between two datasets, how far they are apart, and whether one leaks into the other.

    Raises:
        InputError: not two datasets, or paired ones of other items.   MismatchError: firings of different SAEs.
    """
    check_together(datasets, at_least=2)
    if len(datasets) != 2:
        raise InputError(f"drift compares two datasets, not {len(datasets)}")
    check_count("--shuffles", shuffles)
    check_count("--examples", examples, 0)
    check_share("--near", near)
    check_share("--level", level, one=False)
    a, b = datasets
    if paired and a.ids != b.ids:
        raise MismatchError(f"{a.name} and {b.name} are not the same items in the same order, so they are not paired")
    counts_a, counts_b = a.counts(), b.counts()
    fired = np.flatnonzero(counts_a + counts_b)
    tests = paired_tests(a, b) if paired else rate_tests(counts_a, len(a), counts_b, len(b))
    adjusted = benjamini_hochberg(tests[fired])
    difference, low, high = rate_difference(counts_b[fired], len(b), counts_a[fired], len(a))
    rank = np.lexsort((fired, -np.abs(difference), adjusted > level))
    called = int((adjusted <= level).sum())
    features = [
        {
            "feature": int(fired[i]),
            "rate_a": float(counts_a[fired[i]] / len(a)),
            "rate_b": float(counts_b[fired[i]] / len(b)),
            "difference": float(difference[i]),
            "low": float(low[i]),
            "high": float(high[i]),
            "p": float(tests[fired[i]]),
            "adjusted_p": float(adjusted[i]),
            "differs": bool(adjusted[i] <= level),
            "examples": example_documents(b if difference[i] > 0 else a, int(fired[i]), examples),
        }
        for i in rank[: max(called, SHOWN)]
    ]
    apart = distance_test(a, b, shuffles, seed, paired)
    pairs = [] if paired else leaks(a, b, near)
    return drift_result(a, b, level, near, called, len(fired), features, apart, pairs)


def leaks(a: Dataset, b: Dataset, near: float) -> list[dict[str, Any]]:
    """Near-duplicates between the two, the most similar first."""
    i, j, similar = near_duplicates(a, b, near)
    return [
        {"a": a.ids[x], "b": b.ids[y], "jaccard": float(s)}
        for x, y, s in zip(i.tolist(), j.tolist(), similar.tolist(), strict=True)
    ]


def example_documents(dataset: Dataset, feature: int, n: int) -> list[dict[str, Any]]:
    """The items on which the feature is strongest."""
    rows = np.flatnonzero(dataset.feature == feature)
    rows = rows[np.lexsort((dataset.item[rows], -dataset.value[rows]))][:n]
    return [
        {
            "dataset": dataset.name,
            "id": dataset.ids[dataset.item[row]],
            "value": float(dataset.value[row]),
            "text": None if dataset.texts is None else dataset.texts[dataset.item[row]],
        }
        for row in rows
    ]


def drift_result(
    a: Dataset,
    b: Dataset,
    level: float,
    near: float,
    called: int,
    tested: int,
    features: list[dict[str, Any]],
    apart: Permuted,
    pairs: list[dict[str, Any]],
) -> Result:
    """What was found, as tables and notes."""
    leaked = len({pair["b"] for pair in pairs})
    data = {
        "a": a.name,
        "b": b.name,
        "distance": asdict(apart),
        "tested": tested,
        "different": called,
        "features": features,
        "near_duplicates": pairs,
    }
    summary = [
        ("distance of the rates", apart.found),
        ("under shuffled sides", f"{apart.mean:.4g}, 95% below {apart.high:.4g}"),
        ("p", apart.p),
        ("features that fire", tested),
        (f"of them different (false-discovery rate {level:g})", called),
        (f"items of {b.name} with a near-duplicate in {a.name}", leaked),
    ]
    tables, notes = [Table("Drift", ("", "value"), summary)], []
    found = features[: min(called, SHOWN)]
    if found:
        rows = [
            (
                *(f[name] for name in ("feature", "rate_a", "rate_b", "difference")),
                f"{f['low']:.3f} to {f['high']:.3f}",
                f["adjusted_p"],
                shown(f["examples"]),
            )
            for f in found
        ]
        columns = ("feature", f"in {a.name}", f"in {b.name}", "difference", "95% interval", "adjusted p", "example")
        tables.append(Table("Features that differ", columns, rows))
    else:
        notes.append(
            f"no feature differs between {a.name} and {b.name}: none of the {tested:,} tested passes a false-discovery"
            f" rate of {level:g}"
        )
    drawn = found or features[:SHOWN]
    points = Points(
        "Firing rates of the features that differ most" if found else "Firing rates; no feature differs",
        a.name,
        b.name,
        [str(f["feature"]) for f in drawn],
        [f["rate_a"] for f in drawn],
        [f["rate_b"] for f in drawn],
    )
    if pairs:
        notes.append(
            f"{leaked} of {len(b)} items of {b.name} have a near-duplicate in {a.name} (Jaccard {near:g} or more),"
            f" such as {pairs[0]['b']} of {pairs[0]['a']}: if one is a test set, it leaks"
        )
    most = {pair["b"]: pair for pair in reversed(pairs)}  # the most similar come first
    twins = [(b.name, item, *((most[item]["a"], most[item]["jaccard"]) if item in most else (None, None)))
             for item in b.ids]  # fmt: skip
    items = Table("Items", ("dataset", "id", f"twin in {a.name}", "similarity"), twins)
    parted = "are apart" if apart.p <= level else "are not shown to be apart"
    spoken = (
        f"{a.name} and {b.name} {parted} (p = {apart.p:.2g}): {called:,} of {tested:,} features differ in how often"
        f" they fire; {leaked} of {len(b)} items of {b.name} have a near-duplicate in {a.name}."
    )
    return Result(data, tuple(tables), (points,), tuple(notes), verdict=spoken, items=items)


def shown(examples: list[dict[str, Any]], width: int = 60) -> str:
    """The first example in a few words."""
    if not examples:
        return ""
    text = examples[0]["text"]
    return examples[0]["id"] if text is None else " ".join(text.split())[:width]

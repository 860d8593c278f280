"""Groups of documents that fire like features: what a corpus is made of, without anybody's words for it.

Documents are rows of features: a weight per feature by its value and by how few documents it fires on, every row of
length 1. Their main directions (a truncated singular value decomposition) are grouped by k-means; both are
scikit-learn's. How well a document lies in its group is its silhouette (Rousseeuw 1987): its cosine distance to the
nearest other group less that to its own, over the larger of the two.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, cast

import numpy as np
from jaxtyping import Float64, Int

from qwen_scope.errors import InputError, check_count
from qwen_scope.report import Heatmap
from qwen_scope.stats import Permuted, permuted

from .classify import joined
from .dataset import Dataset, check_together
from .drift import shown
from .result import Result, Table

NUMBERS = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20)
DIRECTIONS = 100
MOST = 1000  # documents that decide on the number of groups and on chance: silhouettes go by pairs
BEGINNINGS = 4  # of k-means, the best of which is taken
CHANCE = 0.05


@dataclass(frozen=True, eq=False)
class Grouping:
    """Which document is in which group.

    Attributes:
        group: of each document, from 0.   near: its cosine with the centre of its group.
        silhouette: the mean over the documents, or over `MOST` of them drawn by the seed.
    """

    group: Int[np.ndarray, " items"]
    near: Float64[np.ndarray, " items"]
    silhouette: float

    @property
    def n(self) -> int:
        """How many groups there are."""
        return int(self.group.max()) + 1


def weights(data: Dataset) -> Any:
    """`(items, width)`, sparse: `sqrt(value) * (1 + ln((1 + n) / (1 + n_f)))`, each row of length 1.

    `n_f` is the number of items on which feature f fires. The root keeps one strong feature from deciding alone.
    """
    from scipy.sparse import csr_array
    from sklearn.preprocessing import normalize

    rarity = 1 + np.log((1 + len(data)) / (1 + data.counts()))
    found = data.matrix(values=True)
    weighted = np.sqrt(np.abs(found.data)) * rarity[found.indices]
    return normalize(csr_array((weighted, found.indices, found.indptr), shape=found.shape))


def directions(rows: Any, seed: int) -> Float64[np.ndarray, "items directions"]:
    """The rows along their main directions, each of length 1."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    n = min(DIRECTIONS, *(side - 1 for side in rows.shape))
    found = TruncatedSVD(max(1, n), random_state=seed).fit_transform(rows)
    return np.asarray(normalize(found), np.float64)


def grouping(x: Float64[np.ndarray, "items directions"], n: int, seed: int) -> Grouping:
    """Rows of length 1 in `n` groups, the largest first; in fewer where there are fewer different rows."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import silhouette_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(n, n_init=cast(Any, BEGINNINGS), random_state=seed).fit(x)
    labels = np.asarray(found.labels_)
    by_size = np.argsort(-np.bincount(labels, minlength=n), kind="stable")
    group = np.argsort(by_size, kind="stable")[labels]
    centres = found.cluster_centers_[by_size]
    centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    some = sample_of(len(x), seed)
    apart = len(set(group[some].tolist()))
    score = silhouette_score(x[some], group[some], metric="cosine") if 1 < apart < len(some) else 0.0
    return Grouping(group, (x * centres[group]).sum(1), float(score))


def best_grouping(x: Float64[np.ndarray, "items directions"], seed: int, numbers: Sequence[int] = NUMBERS) -> Grouping:
    """The grouping with the largest silhouette; of equals the one with fewer groups."""
    every = [grouping(x, n, seed) for n in numbers if n < len(x)]
    return max(every, key=lambda one: one.silhouette)


def dealt(data: Dataset, seed: int) -> Dataset:
    """Every feature's firings given to documents at random, as many as it has: features without anything in common."""
    rng = np.random.default_rng(seed)
    order = np.argsort(data.feature, kind="stable")
    items = np.concatenate([rng.choice(len(data), n, replace=False) for n in data.counts()])
    again = np.lexsort((data.feature[order], items))
    return replace(
        data,
        item=items[again].astype(np.int32),
        feature=data.feature[order][again],
        value=data.value[order][again],
        position=data.position[order][again],
    )


def chance_of(data: Dataset, found: float, shuffles: int, seed: int, numbers: Sequence[int]) -> Permuted:
    """A silhouette beside those of the same documents with their features dealt anew, grouped in the same way."""
    some = data.take(np.sort(sample_of(len(data), seed)))
    each = []
    for i in range(shuffles):
        mixed = weights(dealt(some, seed * 1_000_003 + i))
        mixed = mixed[np.diff(mixed.indptr) > 0]
        each.append(best_grouping(directions(mixed, seed), seed, numbers).silhouette)
    return permuted(found, np.array(each))


def sample_of(n: int, seed: int) -> Int[np.ndarray, " some"]:
    """All of `n`, or `MOST` of them."""
    return np.arange(n) if n <= MOST else np.random.default_rng(seed).choice(n, MOST, replace=False)


def clusters_of(
    datasets: Sequence[Dataset],
    *,
    groups: Annotated[int | None, "How many groups. Default: as many as lie farthest apart, 2 to 20."] = None,
    mark: Annotated[int, "Features that name a group."] = 5,
    examples: Annotated[int, "Example documents per group."] = 3,
    shuffles: Annotated[int, "How often features are dealt to documents at random, for comparison."] = 19,
    seed: Annotated[int, "Of the grouping and the shuffles."] = 0,
) -> Result:
    """Which groups the documents fall into by the features that fire on them, and which features mark each.

    Raises:
        InputError: fewer documents with a feature than groups.   MismatchError: datasets of different SAEs.
    """
    check_together(datasets)
    check_count("--mark", mark)
    check_count("--examples", examples, 0)
    check_count("--shuffles", shuffles)
    data = together(datasets)
    rows = weights(data)
    fires = np.flatnonzero(np.diff(rows.indptr))
    numbers = NUMBERS if groups is None else (check_count("--groups", groups, 2),)
    if len(fires) <= min(numbers):
        raise InputError(f"features fire on {len(fires)} documents; {min(numbers)} groups take more of them")
    found = best_grouping(directions(rows[fires], seed), seed, numbers)
    chance = chance_of(data.take(fires), found.silhouette, shuffles, seed, numbers)
    placed = Placed(data, [(d.name, i) for d in datasets for i in d.ids], fires, found)
    result = clusters_result(placed, chance, mark, examples)
    if groups is None or found.n == groups:
        return result
    return replace(result, notes=(*result.notes, f"{found.n} groups instead of {groups}: no more documents differ"))


def together(datasets: Sequence[Dataset]) -> Dataset:
    """Datasets one after the other as one; ids get the name of theirs in front where there are several."""
    if len(datasets) == 1:
        return datasets[0]
    labels = {feature: label for d in datasets for feature, label in d.labels.items()}
    return replace(joined(", ".join(d.name for d in datasets), datasets), labels=labels)


@dataclass(frozen=True, eq=False)
class Placed:
    """Documents in their groups.

    Attributes:
        data: all documents.   names: of each its dataset and its id there.
        fires: the documents on which a feature fires, which `found` groups.
    """

    data: Dataset
    names: Sequence[tuple[str, str]]
    fires: Int[np.ndarray, " some"]
    found: Grouping

    def group(self) -> Int[np.ndarray, " items"]:
        """The group of every document, or -1."""
        out = np.full(len(self.data), -1)
        out[self.fires] = self.found.group
        return out

    def counts(self) -> Float64[np.ndarray, "groups width"]:
        """On how many documents of each group every feature fires."""
        of = self.group()[self.data.item]
        here = [np.bincount(self.data.feature[of == g], minlength=self.data.width) for g in range(self.found.n)]
        return np.stack(here).astype(np.float64)

    def told(self, g: int, counts: Float64[np.ndarray, "groups width"], mark: int, examples: int) -> dict[str, Any]:
        """One group: its size, the features that mark it, and the documents nearest to its centre."""
        members = np.flatnonzero(self.found.group == g)
        rest = max(1, len(self.fires) - len(members))
        inside, outside = counts[g] / len(members), (counts.sum(0) - counts[g]) / rest
        top = np.lexsort((np.arange(self.data.width), outside - inside))[:mark].tolist()
        nearest = self.fires[members[np.argsort(-self.found.near[members], kind="stable")[:examples]]].tolist()
        labels, texts = self.data.labels, self.data.texts
        features = [
            {"feature": f, "label": labels.get(f), "rate": float(inside[f]), "elsewhere": float(outside[f])}
            for f in top
            if inside[f] > outside[f]
        ]
        documents = [
            {"dataset": self.names[i][0], "id": self.names[i][1], "text": None if texts is None else texts[i]}
            for i in nearest
        ]
        of = Counter(self.names[i][0] for i in self.fires[members].tolist())
        about = {"group": g + 1, "documents": len(members), "of": dict(of)}
        return {**about, "features": features, "examples": documents}


def clusters_result(placed: Placed, chance: Permuted, mark: int, examples: int) -> Result:
    """What was found, as tables, a figure and notes."""
    data, counts, group = placed.data, placed.counts(), placed.group()
    told = [placed.told(g, counts, mark, examples) for g in range(placed.found.n)]
    names = list(dict.fromkeys(name for name, _ in placed.names))
    facts = {
        "silhouette": chance.found,
        "chance": asdict(chance),
        "groups": told,
        "documents": [
            {"dataset": name, "id": one, "group": g + 1 if g >= 0 else None}
            for (name, one), g in zip(placed.names, group.tolist(), strict=True)
        ],
    }
    several = names if len(names) > 1 else []
    rows = [
        (
            *(one[key] for key in ("group", "documents")),
            *(one["of"].get(name, 0) for name in several),
            named(one),
            shown(one["examples"]),
        )
        for one in told
    ]
    marks = [
        (one["group"], f["feature"], f["label"], f["rate"], f["elsewhere"]) for one in told for f in one["features"]
    ]
    apart = [
        ("silhouette", chance.found),
        ("with features dealt at random", f"{chance.mean:.4g}, 95% below {chance.high:.4g}"),
        ("p", chance.p),
    ]
    tables = (
        Table("Groups", ("group", "documents", *several, "marked by", "nearest to its centre"), rows),
        Table("Features that mark a group", ("group", "feature", "label", "rate", "elsewhere"), marks),
        Table("How far groups are apart", ("", "value"), apart),
    )
    features = list(dict.fromkeys(f["feature"] for one in told for f in one["features"]))
    sizes = np.array([one["documents"] for one in told])
    figure = Heatmap(
        "Rates of the features that mark a group",
        [f"{f} {data.labels.get(f, '')}".strip() for f in features],
        [str(one["group"]) for one in told],
        (counts / sizes[:, None])[:, features].T,
    )
    notes = []
    if chance.p > CHANCE:
        notes.append("these groups are no farther apart than those of documents with features dealt at random")
    if silent := int((group < 0).sum()):
        notes.append(f"{silent} of {len(data)} documents are in no group, since no feature fires on them")
    n, apart_said = len(told), "farther apart than" if chance.p <= CHANCE else "not shown to be farther apart than"
    spoken = (
        f"{len(data)} documents fall into {n} group{'s' * (n != 1)}, {apart_said} groups of features dealt at random"
        f" (p = {chance.p:.2g})."
    )
    items = Table.of("Items", facts["documents"])
    return Result(facts, tables, (figure,), tuple(notes), verdict=spoken, items=items)


def named(one: dict[str, Any], most: int = 3) -> str:
    """A group by its features: their labels, or their numbers."""
    return ", ".join(f["label"] or str(f["feature"]) for f in one["features"][:most])

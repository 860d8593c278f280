"""Made-up datasets for the tests of analyses."""

from __future__ import annotations

import numpy as np

from qwen_scope.analysis import Dataset, Scores


def dataset(
    sets: list[set[int]],
    width: int = 12,
    name: str = "a",
    scores: np.ndarray | None = None,
    values: dict[tuple[int, int], float] | None = None,
    layer: int = 0,
    **more,
) -> Dataset:
    """A dataset in which item i fires the features of `sets[i]`, each at 1 unless `values` says otherwise."""
    rows = [(i, f) for i, features in enumerate(sets) for f in sorted(features)]
    item, feature = (np.array([row[c] for row in rows], np.int32) for c in (0, 1))
    value = np.array([(values or {}).get(row, 1.0) for row in rows], np.float32)
    position = np.array([f % 5 for _, f in rows], np.int32)
    made = None if scores is None else Scores(tuple(f"m{i}" for i in range(scores.shape[1])), scores.astype(float))
    ids = tuple(f"{name}{i}" for i in range(len(sets)))
    given = {"sae": "s" * 12, "scores": made, **more}
    return Dataset(name, ids, layer, width, item=item, feature=feature, value=value, position=position, **given)


def random_sets(n: int, width: int, seed: int, p: float = 0.3) -> list[set[int]]:
    """`n` random sets of features, none of them empty."""
    rng = np.random.default_rng(seed)
    share = rng.uniform(0, 2 * p, width)
    return [set(np.flatnonzero(rng.random(width) < share).tolist()) or {int(rng.integers(width))} for _ in range(n)]

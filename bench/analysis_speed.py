"""A benchmark of 25,000 items with 100 features each: seconds and peak memory of every analysis of one dataset.

python bench/analysis_speed.py
"""

from __future__ import annotations

import json
import resource
import sys
import time

import numpy as np

from qwen_scope.analysis import Dataset, redundancy_of, subset_of

ITEMS, K, WIDTH = 25_000, 100, 32_768


def made(seed: int = 0) -> Dataset:
    """Items whose features are as unequal in frequency as those of real dictionaries: a power law."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, WIDTH + 1) ** 0.8
    chances = np.log(share / share.sum())
    feature = np.empty((ITEMS, K), np.int32)
    for start in range(0, ITEMS, 500):
        # The K largest of log-chances plus Gumbel noise are a sample without replacement.
        drawn = chances + rng.gumbel(size=(500, WIDTH))
        feature[start : start + 500] = np.sort(np.argpartition(-drawn, K, axis=1)[:, :K], axis=1)
    item = np.repeat(np.arange(ITEMS, dtype=np.int32), K)
    value = np.ones(ITEMS * K, np.float32)
    ids = tuple(map(str, range(ITEMS)))
    return Dataset("made", ids, 0, WIDTH, "none", item, feature.ravel(), value, item * 0)


def peak() -> float:
    """GB at the peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def main() -> None:
    data, out = made(), {"items": ITEMS, "k": K, "d_sae": WIDTH, "GB before": peak()}
    for name, run in {"redundancy": redundancy_of, "subset": subset_of}.items():
        began, used = time.perf_counter(), time.process_time()
        result = run([data])
        out[name] = {
            "seconds": time.perf_counter() - began,
            "of processor": time.process_time() - used,
            "GB at the peak": peak(),
        }
        out[name] |= {row[0]: row[1:] for table in result.tables for row in table.rows}
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()

"""Write, index and ask a store of made-up activations: sizes, times and memory. No model is needed.

python bench/store.py --tokens 2000000 --out /tmp/store     # 100 million activations
"""

from __future__ import annotations

import argparse
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa

from qwen_scope.store import FeatureStore, LayerInfo, LayerRows, StoreWriter, Window
from qwen_scope.store.layout import TABLES

D_SAE, K, WINDOW, VOCABULARY = 32768, 50, 2**15, 50_000
INFO = LayerInfo(14, "layers.14.resid_post", "made-up", "0" * 64, D_SAE, K, "topk")


def windows(tokens: int, seed: int) -> Iterator[tuple[Window, int]]:
    """Windows of documents of 50 to about 1000 tokens; feature rates and values are log-normal, as real ones are."""
    dice = np.random.default_rng(seed)
    cumulated = np.cumsum(dice.lognormal(0, 1.5, D_SAE))
    words = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    documents = done = 0
    while done < tokens:
        n = min(WINDOW, tokens - done)
        lengths = np.maximum(50, dice.lognormal(5.3, 0.7, n // 50 + 1)).astype(np.int64)
        ends = np.minimum(np.cumsum(lengths), n)
        ends = ends[: int(np.searchsorted(ends, n)) + 1]
        lengths = np.diff(ends, prepend=0)
        document = np.repeat(np.arange(documents, documents + len(lengths), dtype=np.int32), lengths)
        position = (np.arange(n) - np.repeat(ends - lengths, lengths)).astype(np.int32)
        feature = draw(dice, cumulated, n)
        value = dice.lognormal(0, 0.7, n * K).astype(np.float32)
        rows = LayerRows(np.repeat(document, K), np.repeat(position, K), feature.ravel(), value, n)
        ids = np.searchsorted(words, dice.random(n) * words[-1]).astype(np.int32)
        names = np.arange(documents, documents + len(lengths), dtype=np.int32)
        tables = {name: TABLES[name].empty_table() for name in ("masked", "unreadable", "residuals")}
        tables["tokens"] = table("tokens", document, position, ids, [f"word{i} " for i in ids.tolist()])
        source, meta = ["made-up"] * len(names), ["{}"] * len(names)
        starts, cut = done + ends - lengths, np.zeros(len(names), np.int32)
        columns = (names, starts, lengths.astype(np.int32), cut, source, names.astype(np.int64), meta)
        tables["documents"] = table("documents", *columns)
        documents, done = documents + len(lengths), done + n
        yield Window({INFO.layer: rows}, tables), done


def table(name: str, *columns: np.ndarray | list[str]) -> pa.Table:
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=TABLES[name])


def draw(dice: np.random.Generator, cumulated: np.ndarray, n: int) -> np.ndarray:
    """K different features per token, `(n, K)`, ascending."""
    feature = np.searchsorted(cumulated, dice.random((n, K)) * cumulated[-1]).astype(np.int32)
    rows = np.arange(n)
    while len(rows):
        some = np.sort(feature[rows], axis=1)
        again = np.zeros(some.shape, bool)
        again[:, 1:] = some[:, 1:] == some[:, :-1]
        some[again] = dice.integers(0, D_SAE, int(again.sum()))
        feature[rows] = some
        rows = rows[again.any(1)]
    return np.sort(feature, axis=1)


def timed(what: str, run: Callable[[], object]) -> float:
    """Seconds of wall clock; both clocks are printed, because other work may share the processors."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    took = time.perf_counter() - wall
    print(f"{what:<44} {took:10.3f} s   ({time.process_time() - cpu:.3f} s of processor)", flush=True)
    return took


def ask(folder: Path, features: int) -> None:
    """Time the questions on a sample of features, and on the busiest."""
    store: list[FeatureStore] = []
    timed("open", lambda: store.append(FeatureStore(folder)))
    with store[0] as opened:
        tokens = opened.stats(INFO.layer)["tokens"].to_numpy()
        firing = np.flatnonzero(tokens)
        chosen = np.random.default_rng(1).choice(firing, min(features, len(firing)), replace=False).tolist()
        busiest = int(tokens.argmax())
        print(f"rows per feature: median {median(tokens[firing]):,.0f}, busiest {tokens.max():,}")
        for how in ("top", "random", "quantiles"):
            times = []
            for feature in chosen:
                before = time.perf_counter()
                assert opened.contexts(INFO.layer, feature, 20, how=how)
                times.append(1000 * (time.perf_counter() - before))
            line = f"median {median(times):.1f}, 95% {np.quantile(times, 0.95):.1f}, worst {max(times):.1f} ms"
            print(f"20 {how} contexts, {len(chosen)} features: {line}", flush=True)
        for _ in range(2):
            timed("20 top contexts of the busiest feature", lambda: opened.contexts(INFO.layer, busiest, 20))
        row = "SELECT * FROM features WHERE feature = ? ORDER BY value DESC LIMIT 20"
        for _ in range(2):
            timed("20 strongest rows of a feature, in SQL", lambda: opened.sql(row, [chosen[0]]))
        shares = (0.1, 0.5, 0.9)
        timed("quantiles of the busiest feature", lambda: opened.quantiles(INFO.layer, busiest, shares))
        timed("histogram of the busiest feature", lambda: opened.histogram(INFO.layer, busiest))
        timed("statistics of every feature", lambda: opened.stats(INFO.layer))
        timed("features of a document", lambda: opened.document_features(7, INFO.layer))
        timed("documents of a feature", lambda: opened.documents_of(INFO.layer, chosen[0]))
        timed("features that fire with one", lambda: opened.cofiring(INFO.layer, chosen[0]))
        pick = chosen[:10]
        timed("firing table (max) of ten features", lambda: opened.firing("max", [INFO.layer], features=pick))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--out", type=Path, default=Path("made-up-store"))
    parser.add_argument("--features", type=int, default=100, help="how many features to ask about")
    parser.add_argument("--keep", action="store_true", help="leave the store there, and use one that is there")
    options = parser.parse_args()
    if not (options.keep and (options.out / "manifest.json").exists()):
        with StoreWriter(options.out, "made-up", {"tokens": options.tokens}, [INFO]) as writer:
            writing = 0.0
            for window, done in windows(options.tokens, 0):
                before = time.perf_counter()
                writer.add(window, {"done": done})
                writing += time.perf_counter() - before
            print(f"{'write, making the numbers not counted':<44} {writing:10.3f} s", flush=True)
            timed("index: sort by feature, statistics", writer.finish)
    with FeatureStore(options.out) as store:
        rows = store.layer(INFO.layer).activations
        parts = store.manifest.parts
        print(f"{rows:,} activations of {store.manifest.tokens:,} tokens, {store.manifest.documents:,} documents")
        for name in TABLES:
            size = sum(part.bytes for part in parts if part.table == name)
            print(f"{name:<12} {size:>14,} bytes, {size / rows:.3f} per activation")
        total = sum(part.bytes for part in parts)
        print(f"{'all':<12} {total:>14,} bytes, {total / rows:.3f} per activation")
    ask(options.out, options.features)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory of the process: {peak / 1e9:.2f} GB")
    if not options.keep:
        shutil.rmtree(options.out)


if __name__ == "__main__":
    main()

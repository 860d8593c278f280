"""Write, index and ask a store of made-up activations of one layer: disk, time, memory. No model is needed.

    python bench/store.py --tokens 2000000 --out FOLDER [--steps write,index,ask] [--write]   # 100 million activations

Each step may be a process of its own, and a step that was stopped goes on when it is repeated. Figures are kept in
FOLDER.figures.jsonl, or in --figures for stores of several sizes; --write makes the table of all sizes in that file.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa

from qwen_scope.store import FeatureStore, LayerInfo, LayerRows, StoreWriter, Window
from qwen_scope.store.index import spilled
from qwen_scope.store.layout import TABLES, WORK

D_SAE, K, WINDOW, VOCABULARY = 32768, 50, 2**15, 50_000
INFO = LayerInfo(14, "layers.14.resid_post", "made-up", "0" * 64, D_SAE, K, "topk")
STEPS = ("write", "index", "ask")
STORE_BYTES = 11
"""What an activation takes on the disk in the end; the spill of the sort is beside that."""
INDEX_SECONDS, INDEX_BYTES, CONTEXTS_MS = 1800, 8e9, 100
"""Goals: for the sort and the statistics of a billion, and for the 20 strongest contexts of a feature."""

WORDS = np.cumsum(1 / np.arange(1, VOCABULARY + 1))


@cache
def rates(width: int) -> np.ndarray:
    """How often each of `width` features fires, added up."""
    return np.cumsum(np.random.default_rng(0).lognormal(0, 1.5, width))


def windows(tokens: int, first: int, documents: int) -> Iterator[Window]:
    """Windows of documents of 50 to about 1000 tokens; feature rates and values are log-normal, as real ones are.

    Args:
        first, documents: windows and documents that are there already; a window is a function of its number.
    """
    for number in range(first, -(-tokens // WINDOW)):
        dice = np.random.default_rng([1, number])
        done = number * WINDOW
        n = min(WINDOW, tokens - done)
        lengths = np.maximum(50, dice.lognormal(5.3, 0.7, n // 50 + 1)).astype(np.int64)
        ends = np.minimum(np.cumsum(lengths), n)
        ends = ends[: int(np.searchsorted(ends, n)) + 1]
        lengths = np.diff(ends, prepend=0)
        document = np.repeat(np.arange(documents, documents + len(lengths), dtype=np.int32), lengths)
        position = (np.arange(n) - np.repeat(ends - lengths, lengths)).astype(np.int32)
        feature = draw(dice, rates(D_SAE), n)
        value = dice.lognormal(0, 0.7, n * K).astype(np.float32)
        rows = LayerRows(np.repeat(document, K), np.repeat(position, K), feature.ravel(), value, n)
        ids = np.searchsorted(WORDS, dice.random(n) * WORDS[-1]).astype(np.int32)
        names = np.arange(documents, documents + len(lengths), dtype=np.int32)
        tables = {name: TABLES[name].empty_table() for name in ("masked", "unreadable", "residuals")}
        tables["tokens"] = table("tokens", document, position, ids, [f"word{i} " for i in ids.tolist()])
        source, meta = ["made-up"] * len(names), ["{}"] * len(names)
        starts, cut = done + ends - lengths, np.zeros(len(names), np.int32)
        columns = (names, starts, lengths.astype(np.int32), cut, source, names.astype(np.int64), meta)
        tables["documents"] = table("documents", *columns)
        documents += len(lengths)
        yield Window({INFO.layer: rows}, tables)


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


def timed(what: str, run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall clock and of processor; both are printed, because other work may share the processors."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    took, worked = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{what:<44} {took:10.3f} s   ({worked:.3f} s of processor)", flush=True)
    return took, worked


def peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_disk(folder: Path, activations: int) -> None:
    """Say what the store takes on the disk, and end where that is not free."""
    kept, while_sorting = STORE_BYTES * activations, spilled(activations)
    there = folder if folder.exists() else folder.resolve().parent
    free = shutil.disk_usage(there).free + sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    said = f"{activations:,} activations take {kept / 1e9:.1f} GB, and {while_sorting / 1e9:.1f} GB more while they are"
    print(f"{said} sorted; {free / 1e9:.1f} GB are free", flush=True)
    if kept + while_sorting > free:
        sys.exit(f"there is no room for that in {there}; name another folder with --out, or ask for fewer --tokens")


def write_step(writer: StoreWriter, tokens: int) -> dict[str, Any]:
    """Write the windows that are not there yet; the figures of those before are in the writer's state."""
    state = writer.state or {"windows": 0, "documents": 0, "making": 0.0, "seconds": 0.0, "processor": 0.0}
    before = time.perf_counter(), time.process_time()
    for window in windows(tokens, state["windows"], state["documents"]):
        made = time.perf_counter(), time.process_time()
        state = {
            "windows": state["windows"] + 1,
            "documents": state["documents"] + window.tables["documents"].num_rows,
            "making": state["making"] + made[0] - before[0],
        } | {name: state[name] for name in ("seconds", "processor")}
        writer.add(window, state)  # the figures of a window are in the state of the next
        before = time.perf_counter(), time.process_time()
        state |= {
            "seconds": state["seconds"] + before[0] - made[0],
            "processor": state["processor"] + before[1] - made[1],
        }
    print(f"{'write, making the numbers not counted':<44} {state['seconds']:10.3f} s", flush=True)
    return {"seconds": state["seconds"], "processor": state["processor"], "peak": peak()}


@contextmanager
def largest(folder: Path) -> Iterator[list[int]]:
    """The most bytes that lay in a folder, looked at twice a second."""
    found, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            sizes = []
            for path in folder.glob("*"):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            found[0] = max(found[0], sum(sizes))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield found
    finally:
        ended.set()
        looking.join()


def index_step(writer: StoreWriter) -> dict[str, Any]:
    with largest(writer.folder / WORK / "spill") as most:  # pyright: ignore[reportArgumentType]  # a folder here
        seconds, processor = timed("index: sort by feature, statistics", writer.finish)
    return {"seconds": seconds, "processor": processor, "peak": peak(), "spilled": most[0]}


def ask_step(folder: Path, features: int) -> dict[str, Any]:
    """Time the questions on a sample of features, and on the busiest."""
    store: list[FeatureStore] = []
    found: dict[str, Any] = {"open": timed("open", lambda: store.append(FeatureStore(folder)))[0]}
    with store[0] as opened:
        parts = opened.manifest.parts
        found["bytes"] = sum(part.bytes for part in parts)
        rows = opened.layer(INFO.layer).activations
        print(f"{rows:,} activations of {opened.manifest.tokens:,} tokens, {opened.manifest.documents:,} documents")
        for name in TABLES:
            size = sum(part.bytes for part in parts if part.table == name)
            print(f"{name:<12} {size:>14,} bytes, {size / rows:.3f} per activation")
        tokens = opened.stats(INFO.layer)["tokens"].to_numpy()
        firing = np.flatnonzero(tokens)
        chosen = np.random.default_rng(1).choice(firing, min(features, len(firing)), replace=False).tolist()
        busiest = int(tokens.argmax())
        print(f"rows per feature: median {median(tokens[firing]):,.0f}, busiest {tokens.max():,}")
        for how in ("top", "random", "quantiles"):
            times, worked = [], time.process_time()
            for feature in chosen:
                before = time.perf_counter()
                assert opened.contexts(INFO.layer, feature, 20, how=how)
                times.append(1000 * (time.perf_counter() - before))
            worked = 1000 * (time.process_time() - worked) / len(chosen)
            line = f"median {median(times):.1f}, 95% {np.quantile(times, 0.95):.1f}, worst {max(times):.1f} ms"
            print(f"20 {how} contexts, {len(chosen)} features: {line}, {worked:.1f} of processor", flush=True)
            found[how] = [median(times), max(times), worked]
        busy = "20 top contexts of the busiest feature"
        seconds = [timed(busy, lambda: opened.contexts(INFO.layer, busiest, 20))[0] for _ in range(3)]
        found["busiest"] = [int(tokens.max()), 1000 * median(seconds)]
        row = "SELECT * FROM features WHERE feature = ? ORDER BY value DESC LIMIT 20"
        for _ in range(2):
            timed("20 strongest rows of a feature, in SQL", lambda: opened.sql(row, [chosen[0]]))
        shares = (0.1, 0.5, 0.9)
        timed("quantiles of the busiest feature", lambda: opened.quantiles(INFO.layer, busiest, shares))
        timed("histogram of the busiest feature", lambda: opened.histogram(INFO.layer, busiest))
        timed("statistics of every feature", lambda: opened.stats(INFO.layer))
        timed("features of a document", lambda: opened.document_features(7, INFO.layer))
        timed("documents of a feature", lambda: opened.documents_of(INFO.layer, chosen[0]))
        found["cofiring"] = timed("features that fire with one", lambda: opened.cofiring(INFO.layer, chosen[0]))[0]
        pick = chosen[:10]
        timed("firing table (max) of ten features", lambda: opened.firing("max", [INFO.layer], features=pick))
    return {**found, "peak": peak()}


def growth(figures: Path) -> list[str]:
    """The table of all sizes whose steps are all there, smallest first."""
    from side_by_side import markdown

    sizes: dict[int, dict[str, Any]] = {}
    for line in figures.read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        sizes.setdefault(told["tokens"] * K, {})[told["step"]] = told["figures"]
    rows = []
    for activations, told in sorted(sizes.items()):
        if set(told) != set(STEPS):
            continue
        write, index, ask = (told[step] for step in STEPS)
        rows.append(
            (
                f"{activations:,}",
                f"{ask['bytes'] / 1e9:.2f}, {ask['bytes'] / activations:.2f} each",
                f"{write['seconds']:.0f} ({write['processor']:.0f})",
                f"{index['seconds']:.0f} ({index['processor']:.0f})",
                f"{1e6 * index['processor'] / activations:.2f}",
                f"{index['peak'] / 1e9:.2f}",
                f"{index['spilled'] / 1e9:.2f}",
                f"{ask['open']:.2f}",
                f"{ask['top'][0]:.0f}, {ask['top'][1]:.0f} ({ask['top'][2]:.0f})",
                f"{ask['busiest'][1]:.0f} of {ask['busiest'][0]:,}",
                f"{ask['cofiring']:.1f}",
            )
        )
        missed = [
            name
            for name, misses in {
                "time": index["seconds"] > INDEX_SECONDS,
                "memory": index["peak"] > INDEX_BYTES,
                "contexts": ask["top"][1] > CONTEXTS_MS,
            }.items()
            if misses
        ]
        if missed:
            rows[-1] = (f"{rows[-1][0]} (misses: {', '.join(missed)})", *rows[-1][1:])
    columns = (
        "activations",
        "store, GB and bytes",
        "written, s (of processor)",
        "sort and statistics, s (of processor)",
        "µs of processor an activation",
        "peak memory, GB",
        "most spilled, GB",
        "opened, s",
        "20 top contexts of 100 features, ms: median, worst (of processor, mean)",
        "of the busiest feature, ms and rows",
        "what fires with a feature, s",
    )
    words = (
        f"Made-up activations of one layer, {K} a token, {D_SAE:,} features whose rates are log-normal, documents of 50"
        f" to about 1,000 tokens. Making the numbers is not counted. Wanted: sort and statistics within"
        f" {INDEX_SECONDS // 60} minutes and {INDEX_BYTES / 1e9:.0f} GB, and 20 top contexts within {CONTEXTS_MS} ms."
    )
    return [words, "", markdown(columns, rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--out", type=Path, default=Path("made-up-store"))
    parser.add_argument("--steps", default=",".join(STEPS), help="which of them, with a comma between")
    parser.add_argument("--figures", type=Path, help="where figures are kept; default: beside the store")
    parser.add_argument("--features", type=int, default=100, help="how many features to ask about")
    parser.add_argument("--keep", action="store_true", help="leave the store there after the last step")
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    options = parser.parse_args()
    figures = options.figures or options.out.with_name(f"{options.out.name}.figures.jsonl")
    for step in filter(None, options.steps.split(",")):
        if step not in STEPS:
            parser.error(f"a step is one of {', '.join(STEPS)}, not {step!r}")
        if step == "ask":
            found = ask_step(options.out, options.features)
        else:
            check_disk(options.out, options.tokens * K)
            with StoreWriter(options.out, "made-up", {"tokens": options.tokens}, [INFO]) as writer:
                if writer.finished:
                    continue
                found = write_step(writer, options.tokens) if step == "write" else index_step(writer)
        print(f"peak memory of the process: {peak() / 1e9:.2f} GB")
        with figures.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"tokens": options.tokens, "step": step, "figures": found}) + "\n")
        if step == STEPS[-1] and not options.keep:
            shutil.rmtree(options.out)
    if options.write:
        from side_by_side import write

        write("store.py", growth(figures))


if __name__ == "__main__":
    main()

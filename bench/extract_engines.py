"""Extraction with vLLM's engine beside the transformers engine: the same corpus, all layers, answers compared first.

    .venv-serve/bin/python bench/extract_engines.py [MODEL ...] [--rounds 4] [--tokens 20000 ...] [--write]

For `lab` the bundled SAEs; for any other model random SAEs of 4,096 features at four layers. Both
engines read the same documents in turn into new stores; the time is that of the whole extraction, from text to store,
with vLLM already started. Before, both stores are compared: the same tokens, and activations that agree.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from side_by_side import PAGE, Way, alternate, markdown, write
from steer_cost import median_interval

import torch  # isort: skip

from qwen_scope import load_scope  # isort: skip
from qwen_scope.lab import documents  # isort: skip
from qwen_scope.sae import Identity, TopK, save_sae  # isort: skip
from qwen_scope.scope import ExtractOptions, Scope  # isort: skip
from qwen_scope.serve import VllmEngine  # isort: skip
from qwen_scope.store import FeatureStore  # isort: skip
from qwen_scope.text import Corpus, Counted  # isort: skip

WIDTH, K = 4096, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "vLLM engine"
NEAR = 1e-4


def random_saes(folder: Path, layers: list[int], width: int) -> Path:
    """SAEs of random features under the official layout."""
    group = folder / f"SAE-Res-Made-Up-W4K-L0_{K}"
    for layer in layers:
        draw = torch.Generator().manual_seed(layer)
        encoder = torch.randn(WIDTH, width, generator=draw) / width**0.5
        point = f"layers.{layer}.resid_post"
        identity = Identity(group.name, layer, "made up")
        sae = TopK(encoder, encoder.T.contiguous(), torch.zeros(WIDTH), torch.zeros(width), K, point, identity)
        save_sae(sae, group, layout="official")
    return group


def opened(model: str, dtype: str, folder: Path) -> Scope:
    """The lab with its SAEs, any other model with random ones."""
    if model == "lab":
        return load_scope("lab", device=DEVICE)
    from qwen_scope.model import load_config

    text = load_config(model).get_text_config(decoder=True)
    layers = [text.num_hidden_layers * i // 4 for i in range(4)]
    return load_scope(model, sae=str(random_saes(folder, layers, text.hidden_size)), device=DEVICE, dtype=dtype)


def share_equal(mine: FeatureStore, known: FeatureStore) -> float:
    """The share of activations that both stores have, with values that agree.

    Raises:
        SystemExit: other tokens, or values that don't.
    """
    if not mine.sql("SELECT * FROM tokens ORDER BY ALL").equals(known.sql("SELECT * FROM tokens ORDER BY ALL")):
        raise SystemExit("the stores hold different tokens")
    sides: list[dict[Any, float]] = []
    for store in (mine, known):
        found = store.sql("SELECT layer, document, position, feature, value FROM activations")
        columns = [found[name].to_pylist() for name in found.column_names]
        sides.append(dict(zip(zip(*columns[:4], strict=True), columns[4], strict=True)))
    one, other = sides
    both = one.keys() & other.keys()
    if (worst := max(abs(one[key] - other[key]) / max(1.0, other[key]) for key in both)) > NEAR:
        raise SystemExit(f"activations differ by {worst}")
    return len(both) / max(len(one), len(other))


def measure(model: str, dtype: str, rounds: int, tokens: int) -> list[object]:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        return measured(model, dtype, rounds, tokens, Path(folder))


def measured(model: str, dtype: str, rounds: int, tokens: int, folder: Path) -> list[object]:
    """The same with a folder for SAEs and stores."""
    scope = opened(model, dtype, folder)
    texts, total = [], 0
    for one in documents(seed=1, n=5000):
        texts.append(one.text)
        total += len(scope.tokenizer(one.text, verbose=False)["input_ids"])
        if total >= tokens:
            break
    sizes = {} if torch.cuda.is_available() else {"kv_cache_memory_bytes": 2**29}
    engine = VllmEngine.of(scope.loaded, row_tokens=1024, **sizes)
    options = ExtractOptions(row_tokens=1024, counted=Counted.of(scope.tokenizer))
    count = 0

    def extract(engine: VllmEngine | None) -> FeatureStore:
        nonlocal count
        count += 1
        return scope.extract(Corpus(texts, name="bench"), folder / f"{count}", options, engine=engine)

    with extract(None) as known, extract(engine) as mine:
        equal = share_equal(mine, known)
    spent: dict[str, list[float]] = {OURS: [], "transformers": []}

    def counted(name: str, engine: VllmEngine | None) -> Way:
        """Keeps the seconds of the processor; those of the clock are kept by `alternate`."""

        def way() -> None:
            begun = time.process_time()
            extract(engine).close()
            spent[name].append(time.process_time() - begun)

        return way

    times = alternate({OURS: counted(OURS, engine), "transformers": counted("transformers", None)}, rounds)
    rate = [f"{total / statistics.median(times[name]):,.0f}" for name in times]
    kind = str(scope.model.dtype).removeprefix("torch.")
    return [
        Path(model).name,
        kind,
        len(scope.saes),
        f"{total:,}",
        f"{equal:.5f}",
        *rate,
        *(
            "{:.2f} [{:.2f}, {:.2f}]".format(*median_interval(np.divide(each["transformers"], each[OURS])))
            for each in (times, spent)
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["lab"])
    parser.add_argument("--dtype", default="float32", help="Of every model but the lab.")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="*", default=[20000], help="One number for each model, or for all.")
    parser.add_argument("--write", action="store_true", help="Into docs/performance.md.")
    args = parser.parse_args()
    sizes = args.tokens * len(args.models) if len(args.tokens) == 1 else args.tokens
    # an engine of vLLM does not leave its process as it found it
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        rows = [
            pool.submit(measure, model, args.dtype, args.rounds, tokens).result()
            for model, tokens in zip(args.models, sizes, strict=True)
        ]
    columns = ["model", "dtype", "layers", "tokens", "equal", "vLLM, tokens/s", "transformers, tokens/s"]
    columns += ["speed-up", "of processor time"]
    said = (
        f"The whole extraction, from text to store, {args.rounds} rounds in turn after both stores were compared: no"
        f" activation that both hold differs by more than {NEAR:g} of its value; `equal` is the share that both hold."
        " The speed-up is the median over rounds with its 95% interval, by the clock and by the processor's seconds."
    )
    lines = [said + "\n", markdown(columns, rows)]
    print("\n".join(lines))
    if args.write:
        write("extract_engines.py", lines, PAGE)


if __name__ == "__main__":
    main()

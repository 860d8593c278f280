"""All layers of a released group in one pass: SAEs of the true bytes from the disk, two at most in memory.

    python bench/all_layers.py 8B [--tokens 64] [--layers N] [--storage bfloat16,int8] [--out FOLDER] [--write]

A model of random weights in the group's shape reads a few tokens, and each layer's SAE is brought from its file by
`in_turn` and encodes them, as `extract` does beside a GPU; here the memory of the process stands for that of the
device. Every layer has the true width, and its bytes come from the disk, not from the page cache. To save disk, the
SAEs of a group lie in two files, which the layers take in turn. To save memory, the blocks of a model share their
weights (one set for each kind of block), and its vocabulary is the lab's. Figures are kept in FOLDER.figures.jsonl, the
weights are deleted; --write makes the table of all groups in that file.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import resource
import shutil
import statistics
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from side_by_side import markdown, random_model, write

import torch  # isort: skip
from torch import Tensor, nn  # isort: skip

from qwen_scope import load_sae, load_scope, save_sae  # isort: skip
from qwen_scope.lab import documents  # isort: skip
from qwen_scope.model import HookPoint, capture, model_sizes  # isort: skip
from qwen_scope.sae import SAE, Identity, TopK, catalog  # isort: skip
from qwen_scope.scope import config_of, plan  # isort: skip
from qwen_scope.scope.plan import TILES  # isort: skip
from qwen_scope.scope.prefetch import in_turn  # isort: skip

GROUPS = {
    "8B": "SAE-Res-Qwen3-8B-Base-W64K-L0_50",
    "27B": "SAE-Res-Qwen3.5-27B-W80K-L0_50",
    "35B-A3B": "SAE-Res-Qwen3.5-35B-A3B-Base-W128K-L0_100",
}
STORAGE = ("bfloat16", "int8")
FILES, ALONE = 2, 3  # files of a group, and layers that are timed one step at a time
DISK = 25 * 10**9
POOL = 2**23  # numbers that are drawn for an SAE


def bench_model(group: catalog.Group, vocabulary: int) -> nn.Module:
    """The group's model with blocks that share the weights of their kind."""
    config = config_of(group.model)
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * group.layers)
    few = sorted(set(kinds))
    config.vocab_size, config.num_hidden_layers = vocabulary, len(few)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = few
    model = random_model(config)
    one = dict(zip(few, model.model.layers, strict=True))
    shared = {id(tensor): tensor for block in one.values() for tensor in (*block.parameters(), *block.buffers())}
    model.model.layers = nn.ModuleList([copy.deepcopy(one[kind], dict(shared)) for kind in kinds])
    model.config.num_hidden_layers = len(kinds)
    if getattr(config, "layer_types", None) is not None:
        model.config.layer_types = kinds
    return model


def random_sae(group: catalog.Group, number: int) -> TopK:
    """Gaussian features in bf16: every row is a stretch of the same numbers from another place on."""
    dice = torch.Generator().manual_seed(number)
    numbers = torch.randn(POOL, generator=dice).bfloat16()

    def drawn(rows: int, columns: int, size: float) -> Tensor:
        matrix = torch.empty(rows, columns, dtype=torch.bfloat16)
        for row, at in enumerate(torch.randint(POOL - columns, (rows,), generator=dice).tolist()):
            torch.mul(numbers[at : at + columns], size, out=matrix[row])
        return matrix

    weights = drawn(group.d_sae, group.d_model, group.d_model**-0.5), drawn(group.d_model, group.d_sae, 1.0)
    vectors = torch.zeros(group.d_sae), torch.zeros(group.d_model)
    point = f"layers.{number}.resid_post"
    return TopK(*weights, *vectors, k=group.k, hook_point=point, identity=Identity("made-up", number, f"{number:064x}"))


def make_files(group: catalog.Group, storage: str, folder: Path) -> None:
    """The SAEs of a group on the disk, one after the other."""
    kept = 2 * FILES * group.d_sae * group.d_model * (1 if storage == "int8" else 2)
    free = shutil.disk_usage(folder.parent).free
    print(f"{group.name} in {storage}: {kept / 1e9:.1f} GB on the disk, {free / 1e9:.1f} GB are free", flush=True)
    if kept > min(free, DISK):
        sys.exit(f"there is no room for that in {folder.parent}; name another folder with --out")
    for number in range(FILES):
        save_sae(random_sae(group, number), folder / str(number), layout="safetensors", dtype=getattr(torch, storage))
        gc.collect()


def forget(folder: Path) -> None:
    """Leave nothing of a folder in the page cache, so that the next reader waits for the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


class Files(Mapping[int, SAE]):
    """The SAEs of all layers, each brought from its file into the memory of the process when it is asked for.

    Attributes:
        alive, most: how many are in memory, and how many there were at most.
    """

    def __init__(self, folder: Path, layers: int) -> None:
        self.folder, self.layers, self.alive, self.most = folder, layers, 0, 0

    def __getitem__(self, layer: int) -> SAE:
        place = self.folder / str(layer % FILES)
        forget(place)
        sae = load_sae(place)
        if sae.meta.get("rounded") is None:  # what was in 8 bits is in memory already
            sae = replace(cast(Any, sae), W_enc=sae.W_enc.clone(), W_dec=sae.W_dec.clone())
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(sae, self.gone)
        return sae

    def gone(self) -> None:
        self.alive -= 1

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.layers))

    def __len__(self) -> int:
        return self.layers


def own_memory() -> int:
    """Bytes of memory that are no pages of files."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


@contextmanager
def watched(found: dict[str, Any]) -> Iterator[None]:
    """The most memory while the block runs, beside what was there before, and its seconds."""
    over, most = threading.Event(), [own_memory()]

    def watch() -> None:
        while not over.wait(0.01):
            most.append(max(most.pop(), own_memory()))

    thread = threading.Thread(target=watch)
    thread.start()
    before, wall, cpu = own_memory(), time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        found["seconds"], found["processor"] = time.perf_counter() - wall, time.process_time() - cpu
        over.set()
        thread.join()
        found["peak"] = max(*most, own_memory()) - before


def alone(saes: Files, h: Tensor) -> tuple[float, float]:
    """Median seconds of bringing an SAE and of encoding with it, one after the other."""
    read, encoded = [], []
    for layer in range(min(ALONE, len(saes))):
        start = time.perf_counter()
        sae = saes[layer]
        read.append(time.perf_counter() - start)
        start = time.perf_counter()
        sae.encode(h)
        encoded.append(time.perf_counter() - start)
        del sae
    return statistics.median(read), statistics.median(encoded)


@torch.no_grad()
def measure(name: str, storage: str, tokens: int, layers: int | None, folder: Path) -> dict[str, Any]:
    """One group and one kind of storage."""
    group = catalog.find(GROUPS[name])
    n_layers = min(layers or group.layers, group.layers)
    make_files(group, storage, folder)
    tokenizer = load_scope("lab", device="cpu").tokenizer
    text = " ".join(document.text for document in documents(seed=1, n=200))
    ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"][:tokens]])
    model = bench_model(group, len(tokenizer))
    points = [HookPoint(layer) for layer in range(n_layers)]
    start = time.perf_counter()
    residuals = {point.layer: h[0] for point, h in capture(model, ids, points).items()}
    forward = time.perf_counter() - start
    del model
    gc.collect()
    saes = Files(folder, n_layers)
    read, encoded = alone(saes, residuals[0])
    saes.most = saes.alive
    found: dict[str, Any] = {}
    with watched(found):
        for layer, sae in in_turn(saes):
            acts = sae.encode(residuals.pop(layer))
            del sae
            print(f"  layer {layer}: {acts.indices.shape[0]} tokens", flush=True)
    sizes = model_sizes(config_of(group.model))
    planned = plan(sizes, group.d_sae, n_layers, sae_dtype="bfloat16")
    assert saes.most <= 2, f"{saes.most} SAEs were in memory"
    bytes_ = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // FILES
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        **found, "group": group.name, "storage": storage, "tokens": tokens, "layers": n_layers, "of": group.layers,
        "d_model": group.d_model, "d_sae": group.d_sae, "k": group.k, "file": bytes_, "forward": forward, "read": read,
        "encode": encoded, "alive": saes.most, "planned": 2 * planned.sae + TILES, "sae": planned.sae, "resident": most,
        "load": os.getloadavg()[0], "device": planned.in_turn,
    }  # fmt: skip


def rows(figures: Path) -> list[str]:
    """The table of what was measured last of each group and storage."""
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for line in figures.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        last[one["group"], one["storage"]] = one
    cells = [
        (
            f"{one['group']} ({one['layers']} of {one['of']} layers)",
            one["storage"],
            f"{one['file'] / 1e9:.2f}",
            f"{one['read']:.2f}",
            f"{one['encode']:.2f}",
            f"{one['seconds'] / one['layers']:.2f} ({one['processor'] / one['layers']:.2f})",
            f"{one['seconds']:.0f}",
            f"{one['alive']}",
            f"{one['peak'] / 1e9:.2f}",
            f"{one['planned'] / 1e9:.2f}",
            f"{one['device'] / 1e9:.1f}",
            f"{one['load']:.1f}",
        )
        for one in last.values()
    ]
    columns = (
        "group", "stored as", "file of a layer, GB", "brought from the disk, s", "encoded, s",
        "a layer in the sweep, s (of processor)", "all of them, s", "SAEs in memory at most", "peak memory, GB",
        "planned for two SAEs and tiles, GB", "`plan`: model in bf16 and sweep, GB", "load",
    )  # fmt: skip
    tokens = sorted({one["tokens"] for one in last.values()})
    words = (
        f"Random weights, every layer of the true width, {' and '.join(map(str, tokens))} tokens; the script says what"
        " layers share to save disk and memory. Bringing is from the disk, page cache emptied; the next SAE is"
        " brought while one encodes. 8 bits are unpacked to bf16 on the way. Peak memory is what the sweep adds to the"
        " process, in memory that stands for a device's; the language model is not counted in it."
        " Where the load is above the number of processors, seconds that are not of processor are those of a machine at"
        " other work."
    )
    return [words, "", markdown(columns, cells)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", nargs="*", help=f"which of {', '.join(GROUPS)}")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, help="only the first so many; default: all")
    parser.add_argument("--storage", default=",".join(STORAGE), help="which of them, with a comma between")
    parser.add_argument("--out", type=Path, default=Path("made-up-saes"))
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    options = parser.parse_args()
    figures = options.out.with_name(f"{options.out.name}.figures.jsonl")
    for name in options.group:
        if name not in GROUPS:
            parser.error(f"a group is one of {', '.join(GROUPS)}, not {name!r}")
        for storage in filter(None, options.storage.split(",")):
            folder = options.out / f"{name}-{storage}"
            folder.mkdir(parents=True)
            try:
                found = measure(name, storage, options.tokens, options.layers, folder)
            finally:
                shutil.rmtree(folder)
            print(json.dumps(found), flush=True)
            with figures.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
    if options.write:
        write("all_layers.py", rows(figures))


if __name__ == "__main__":
    main()

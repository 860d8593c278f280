"""Encode of each toolkit on the same tensors, at the shapes of the released SAEs, and on a CPU without bf16.

    python bench/encode.py [--shapes 0 1 ...] [--rounds 5]

With a GPU the largest shape is measured there, and the CPU's shapes only where they are named.

Runs where sae_lens is installed (`tests/peers/run.sh sae_lens` makes that environment); `make bench` does it all.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from side_by_side import (
    PAGE,
    Way,
    add_peers,
    alternate,
    at_least,
    at_most,
    bare_product,
    memory,
    ratio,
    table,
    tensors,
    write,
)

import torch  # isort: skip

from qwen_scope.sae import FeatureActs, TopK  # isort: skip

# d_model, d_sae, k, tokens
SHAPES = [
    (2048, 32768, 100, 4096), (2048, 32768, 50, 1024), (4096, 65536, 50, 1024), (5120, 81920, 50, 4096),
    (2048, 131072, 100, 1024),
]  # fmt: skip
# Every way to write the same fp32 product is timed where that takes seconds; where it takes minutes, sae_lens alone.
FEW_FEATURES, MOST_WORK = 32768, 2048 * 32768 * 4096
GOALS = {(2048, 32768, 100): 2.5, (5120, 81920, 50): 3.0}
ON_GPU = (5120, 81920, 50, 16384)
MEMORY = 256 * 2**20
# What makes a process do without AVX-512 and bf16.
WITHOUT = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def sae_lens_way(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int) -> Way:
    from sae_lens import TopKSAE, TopKSAEConfig

    d_sae, d_model = W.shape
    with torch.device("meta"):
        sae = TopKSAE(TopKSAEConfig(d_in=d_model, d_sae=d_sae, k=k, apply_b_dec_to_input=False))
    parts = {"W_enc": W.T.contiguous(), "b_enc": b, "b_dec": b.new_zeros(d_model)}
    parts["W_dec"] = b.new_zeros(1, 1).expand(d_sae, d_model)  # encode does not read it
    for name, value in parts.items():
        setattr(sae, name, torch.nn.Parameter(value, requires_grad=False))
    return lambda: (sae.encode(x), None)


def sparsify_way(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int) -> Way:
    from sparsify import SparseCoder, SparseCoderConfig

    d_sae, d_model = W.shape
    sae = SparseCoder(d_model, SparseCoderConfig(num_latents=d_sae, k=k), device="meta", decoder=False)
    sae.encoder.weight = torch.nn.Parameter(W, requires_grad=False)
    sae.encoder.bias = torch.nn.Parameter(b, requires_grad=False)
    sae.b_dec = torch.nn.Parameter(b.new_zeros(d_model), requires_grad=False)

    def encode() -> tuple[torch.Tensor, torch.Tensor]:
        found = sae.encode(x)
        return found.top_acts, found.top_indices

    return encode


def demo_way(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int) -> Way:
    """The official demo: rectified pre-activations, their k largest, scattered into dense rows."""

    def encode() -> tuple[torch.Tensor, None]:
        found = torch.relu(x @ W.T + b).topk(k, dim=-1)
        return torch.zeros(len(x), len(W), device=x.device).scatter_(1, found.indices, found.values), None

    return encode


def card_way(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int) -> Way:
    """The model card's snippet: the k largest pre-activations."""

    def encode() -> tuple[torch.Tensor, torch.Tensor]:
        found = (x @ W.T + b).topk(k, dim=-1)
        return found.values, found.indices

    return encode


def agree(name: str, answer: tuple, ours: FeatureActs, x: torch.Tensor, sae: TopK) -> None:
    """Raise unless the same features are found, but for pre-activations equal within fp32 rounding."""
    values, indices = answer
    for start in range(0, len(x), 256):
        rows = slice(start, start + 256)
        theirs = values[rows].float()
        if indices is not None:
            theirs = values.new_zeros(len(theirs), sae.d_sae).scatter(1, indices[rows].long(), values[rows])
        mine = ours[rows].to_dense()
        room = 1e-5 * sae.W_enc.norm(dim=1).max() * x[rows].norm(dim=1, keepdim=True)
        apart = (mine - theirs).abs() > room
        for row, feature in apart.nonzero().tolist():
            exact = x[rows][row].double() @ sae.W_enc[feature].double() + sae.b_enc[feature].double()
            if abs(exact - mine[row].topk(sae.k).values[-1]) > room[row]:
                raise SystemExit(f"{name} and qwen-scope differ in row {start + row}, feature {feature}")


def measure(shape: tuple[int, int, int, int], rounds: int, device: str = "cpu") -> dict:
    """Times of one shape, with what else its table says."""
    d_model, d_sae, k, n = shape
    gc.collect()
    x, W, b = tensors(d_model, d_sae, n, device)
    sae = TopK(W, W.T, b, b.new_zeros(d_model), k=k)
    ways: dict[str, Way] = {"qwen-scope": lambda: sae.encode(x)}
    makers = {"sae_lens": sae_lens_way}
    if device != "cpu" or d_model * d_sae * n <= MOST_WORK:
        makers["sparsify"] = sparsify_way
        if device != "cpu" or d_sae <= FEW_FEATURES:
            makers |= {"official demo": demo_way, "model card": card_way}
    add_peers(ways, makers, x, W, b, k)
    ours = sae.encode(x)
    stats = sae.encode_stats
    assert stats is not None
    # Every row of one peer's answer, and the first rows of the others'.
    rows = n
    for name, way in ways.items():
        if name != "qwen-scope":
            values, indices = way()
            agree(name, (values[:rows], None if indices is None else indices[:rows]), ours[:rows], x[:rows], sae)
            rows = min(n, 512)
            del values, indices
    extra = memory(ways["qwen-scope"]) if device == "cpu" else 0
    ways["bare bf16 product"] = bare_product(x, W)
    print(shape, stats, flush=True)
    return {"shape": shape, "stats": stats.__dict__, "extra": extra, "times": alternate(ways, rounds)}


def section(found: dict, where: str = "") -> list[str]:
    d_model, d_sae, k, n = found["shape"]
    stats, times = found["stats"], found["times"]
    lines = [f"\n### {n:,} tokens, d_model {d_model:,}, d_sae {d_sae:,}, k {k}{where}\n"]
    said = f"Path `{stats['path']}`: {stats['fallback']} of {stats['rows']:,} rows fell back, "
    said += f"{stats['candidates'] / stats['rows']:.0f} candidates a row"
    if found["extra"]:
        miss = "" if found["extra"] <= MEMORY else ": **misses**"
        said += f"; {found['extra'] / 2**20:.0f} MB of extra peak memory, wanted at most 256{miss}"
    verdicts = {}
    if "sae_lens" in times:
        slower = ratio(times, "sae_lens", "qwen-scope")
        goal = 1.0 if "without" in where else 5.0 if "GPU" in where else GOALS.get((d_model, d_sae, k))
        verdicts["sae_lens"] = at_least(slower, goal) if goal else ""
    if (d_model, d_sae, k) in GOALS and "without" not in where:
        # Beside a matrix unit whatever is not the product weighs more.
        goal = 1.5 if "GPU" in where else 2.0 if torch.cpu.get_capabilities().get("amx_bf16") else 1.3
        verdicts["bare bf16 product"] = at_most(ratio(times, "qwen-scope", "bare bf16 product"), goal)
    if "sae_lens" in times:
        said += ". Every row has the features of sae_lens"
    return [*lines, f"{said}.\n", *table(times, "qwen-scope", verdicts)]


def without_bf16(rounds: int) -> dict:
    """The first shape in a process that is told to do without AVX-512."""
    command = [sys.executable, "-W", "ignore", __file__, "--worker", "--rounds", str(rounds)]
    done = subprocess.run(command, env={**os.environ, **WITHOUT}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="by default 5 for the first shape and 3 for the others")
    every = [] if torch.cuda.is_available() else list(range(len(SHAPES)))
    parser.add_argument("--shapes", type=int, nargs="*", default=every, help="which of SHAPES on the CPU")
    parser.add_argument("--tokens", type=int, help="the same number for every shape")
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.worker:
        print(json.dumps(measure((2048, 32768, 100, 1024), args.rounds)))
        return
    lines: list[str] = []
    for i in args.shapes:
        shape = (*SHAPES[i][:3], args.tokens or SHAPES[i][3])
        lines += section(measure(shape, args.rounds or (3 if i else 5)))
        write("encode.py", lines, args.out)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = False
        lines += section(measure(ON_GPU, args.rounds or 5, "cuda"), ", on a GPU, TF32 off")
    else:
        lines += section(without_bf16(args.rounds or 3), ", without AVX-512 and bf16 instructions")
    write("encode.py", lines, args.out)


if __name__ == "__main__":
    main()

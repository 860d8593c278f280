"""Encode of each toolkit on the same tensors, alternately in one run; answers are compared before anything is timed.

Runs where sae_lens is installed (`tests/peers/run.sh sae_lens` makes that environment), with this package's source on
the path; sparsify is added from its own environment when there is one: `make bench`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))
sys.path += [str(p) for p in ROOT.glob(".venv-sparsify/lib/python*/site-packages")]

import torch  # noqa: E402

from qwen_scope.sae import FeatureActs, TopK  # noqa: E402
from qwen_scope.sae.kernels import compiled  # noqa: E402

SHAPES = [(2048, 32768, 100), (2048, 32768, 50), (4096, 65536, 50), (5120, 81920, 50), (2048, 131072, 100)]
# (d_model, d_sae, k) -> at least this many times faster than sae_lens
GOALS = {(2048, 32768, 100): 2.5, (5120, 81920, 50): 3.0}
WITHIN = 2.0  # of the bare bf16 product, at the first shape
MEMORY = 256 * 2**20

Way = Callable[[], tuple[torch.Tensor, torch.Tensor] | None]


def tensors(d_model: int, d_sae: int, n: int) -> tuple[torch.Tensor, ...]:
    """Random features, residuals with two massive dimensions, and a first token of 100 times the norm."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(d_sae, d_model, generator=g).div_(d_model**0.5)
    x = torch.randn(n, d_model, generator=g)
    x[:, [11, 1000]] *= 30
    x[0] *= 100
    return x, W, torch.randn(d_sae, generator=g) * 0.1


def sae_lens_way(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int) -> Way:
    from sae_lens import TopKSAE, TopKSAEConfig

    d_sae, d_model = W.shape
    with torch.device("meta"):
        sae = TopKSAE(TopKSAEConfig(d_in=d_model, d_sae=d_sae, k=k, apply_b_dec_to_input=False))
    parts = {"W_enc": W.T.contiguous(), "b_enc": b, "b_dec": torch.zeros(d_model)}
    parts["W_dec"] = torch.zeros(1, 1).expand(d_sae, d_model)  # encode does not read it
    for name, value in parts.items():
        setattr(sae, name, torch.nn.Parameter(value, requires_grad=False))

    def encode() -> tuple[torch.Tensor, torch.Tensor]:
        dense = sae.encode(x)
        return dense, torch.empty(0)

    return encode


def sparsify_way(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int) -> Way:
    from sparsify import SparseCoder, SparseCoderConfig

    d_sae, d_model = W.shape
    sae = SparseCoder(d_model, SparseCoderConfig(num_latents=d_sae, k=k), device="meta", decoder=False)
    sae.encoder.weight = torch.nn.Parameter(W, requires_grad=False)
    sae.encoder.bias = torch.nn.Parameter(b, requires_grad=False)
    sae.b_dec = torch.nn.Parameter(torch.zeros(d_model), requires_grad=False)

    def encode() -> tuple[torch.Tensor, torch.Tensor]:
        found = sae.encode(x)
        return found.top_acts, found.top_indices

    return encode


def demo_way(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int) -> Way:
    """The official demo: rectified pre-activations, their k largest."""

    def encode() -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.relu(x @ W.T + b).topk(k, dim=-1)
        return found.values, found.indices

    return encode


def ways(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int) -> tuple[dict[str, Way], TopK]:
    ours = TopK(W, W.T, b, torch.zeros(W.shape[1]), k=k)
    low, W_low = x.bfloat16(), W.bfloat16()

    def encode() -> tuple[torch.Tensor, torch.Tensor]:
        acts = ours.encode(x)
        return acts.values, acts.indices

    found: dict[str, Way] = {"qwen-scope": encode}
    for name, make in {"sae_lens": sae_lens_way, "sparsify": sparsify_way, "official demo": demo_way}.items():
        try:
            found[name] = make(x, W, b, k)
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)
    found["bare bf16 product"] = lambda: product(low, W_low)
    return found, ours


def product(low: torch.Tensor, W_low: torch.Tensor) -> None:
    """The floor: the product alone, in tiles of the same size, its results thrown away."""
    for tile in low.split(512):
        torch.mm(tile, W_low.T)


def agree(name: str, answer: tuple[torch.Tensor, torch.Tensor], ours: FeatureActs, x: torch.Tensor, sae: TopK) -> None:
    """Raise unless the same features are found, but for pre-activations equal within fp32 rounding."""
    values, indices = answer
    for start in range(0, len(x), 256):
        rows = slice(start, start + 256)
        if indices.numel():
            theirs = values.new_zeros(len(values[rows]), sae.d_sae).scatter(1, indices[rows].long(), values[rows])
        else:
            theirs = values[rows].float()
        mine = ours[rows].to_dense()
        room = 1e-5 * sae.W_enc.norm(dim=1).max() * x[rows].norm(dim=1, keepdim=True)
        apart = (mine - theirs).abs() > room
        for row, feature in apart.nonzero().tolist():
            exact = x[rows][row].double() @ sae.W_enc[feature].double() + sae.b_enc[feature].double()
            if abs(exact - mine[row].topk(sae.k).values[-1]) > room[row]:
                raise SystemExit(f"{name} and qwen-scope differ in row {start + row}, feature {feature}")


def extra_memory(encode: Way) -> int:
    """Bytes that one call adds to the peak of the resident memory; 0 where the system does not tell."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return 0
    clear.write_text("5")
    read = {line.split(":")[0]: line.split()[1] for line in status.read_text().splitlines() if line.startswith("Vm")}
    encode()
    peak = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return (int(peak) - int(read["VmRSS"])) * 1024


def measure(shape: tuple[int, int, int], n: int, rounds: int) -> list[str]:
    """The rows of one shape's table."""
    d_model, d_sae, k = shape
    x, W, b = tensors(d_model, d_sae, n)
    found, sae = ways(x, W, b, k)
    ours = sae.encode(x)
    stats = sae.encode_stats
    assert stats is not None
    small = min(n, 512)
    for name, way in found.items():
        if name not in ("qwen-scope", "bare bf16 product"):
            answer = way()
            assert answer is not None
            agree(name, (answer[0][:small], answer[1][:small]), ours[:small], x[:small], sae)
            del answer
    extra = extra_memory(found["qwen-scope"])
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, way in found.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
            print(shape, n, name, f"{times[name][-1]:.3f} s", flush=True)
    mine = times["qwen-scope"]
    lines = [f"\n### {n:,} tokens, d_model {d_model:,}, d_sae {d_sae:,}, k {k}\n"]
    lines.append(f"Path `{stats.path}`: {stats.fallback} of {stats.rows:,} rows fell back, "
                 f"{stats.candidates / stats.rows:.0f} candidates a row; {extra / 2**20:.0f} MB beyond what was "
                 f"held{'' if extra <= MEMORY else ' (**misses** 256 MB)'}.\n")  # fmt: skip
    lines += ["| | median s | min | max | times ours, median of rounds | |", "|---|---|---|---|---|---|"]
    for name, seconds in times.items():
        ratio = statistics.median(t / m for t, m in zip(seconds, mine, strict=True))
        verdict = ""
        if name == "sae_lens" and shape in GOALS:
            verdict = f"{'reaches' if ratio >= GOALS[shape] else '**misses**'} {GOALS[shape]}"
        if name == "bare bf16 product" and shape == SHAPES[0]:
            verdict = f"{'within' if 1 / ratio <= WITHIN else '**not within**'} {WITHIN:.0f}x ({1 / ratio:.2f}x)"
        cells = f"{statistics.median(seconds):.3f} | {min(seconds):.3f} | {max(seconds):.3f} | {ratio:.2f}"
        lines.append(f"| {name} | {cells} | {verdict} |")
    return lines


def machine() -> str:
    cpu = torch.cpu.get_capabilities().get("cpu_name", "unknown CPU")
    caps = [name for name in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(name)]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{cpu}, {torch.get_num_threads()} threads, {' and '.join(caps) or 'no bf16 instructions'}, torch "
        f"{torch.__version__}, Python {platform.python_version()}, numba {'yes' if compiled.available() else 'no'}; "
        f"load at the end {load}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, help="by default 4,096 for the first shape and 1,024 for the others")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", type=int, nargs="*", default=list(range(len(SHAPES))), help="which of SHAPES")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md")
    args = parser.parse_args()
    lines: list[str] = []
    torch.set_grad_enabled(False)
    for shape in (SHAPES[i] for i in args.shapes):
        lines += measure(shape, args.tokens or (4096 if shape == SHAPES[0] else 1024), args.rounds)
        write(args.out, lines)


def write(out: Path, lines: list[str]) -> None:
    """The page so far, so that a long run that is stopped leaves what it measured."""
    head = [
        "# Performance\n",
        "Written by `make bench`. All of a table ran alternately in one process on the same tensors, and the answers",
        "were compared first. A ratio is the median over rounds of theirs to ours, so other work on the machine weighs",
        "on both; above 1 is slower than ours.\n",
        machine(),
    ]
    out.write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()

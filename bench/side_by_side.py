"""What the scripts beside this one share: alternate runs, the page they write, peers on the path."""

from __future__ import annotations

import gc
import os
import platform
import re
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
ROOT = Path(__file__).parents[1]
PEERS = ("sae_lens", "sparsify", "dictionary_learning")
sys.path.insert(0, str(ROOT / "src"))
for peer in PEERS:
    sys.path += [str(p) for p in ROOT.glob(f".venv-{peer}/lib/python*/site-packages") if str(p) not in sys.path]

import torch  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"
ORDER = ("encode.py", "encode_decode.py", "train_step.py", "extract.py", "extract_peers.py", "open.py")

Way = Callable[[], Any]


def alternate(ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, one call of each per round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            answer = way()
            wait()
            times[name].append(time.perf_counter() - start)
            del answer
            print(f"  {name}: {times[name][-1]:.3f} s", flush=True)
    return times


def wait() -> None:
    """Until the accelerator has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(times: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median over rounds of one way's time divided by another's."""
    return statistics.median(a / b for a, b in zip(times[name], times[to], strict=True))


def table(times: Mapping[str, list[float]], ours: str, verdicts: Mapping[str, str]) -> list[str]:
    """A row per way."""
    lines = ["| | median s | min | max | times ours | |", "|---|---|---|---|---|---|"]
    for name, seconds in times.items():
        cells = [f"{value:.3f}" for value in (statistics.median(seconds), min(seconds), max(seconds))]
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio(times, name, ours):.2f} | {verdicts.get(name, '')} |")
    return lines


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; floats with two digits after the point."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def at_least(value: float, goal: float) -> str:
    """`4.1x, wanted 2.5x`, marked where it misses."""
    return f"{value:.2f}x, wanted at least {goal:g}x" + ("" if value >= goal else ": **misses**")


def at_most(value: float, goal: float) -> str:
    return f"ours is {value:.2f}x this, wanted at most {goal:g}x" + ("" if value <= goal else ": **misses**")


def write(script: str, lines: list[str], out: Path = PAGE) -> None:
    """Replace the section of one script on this kind of machine; the others and what stands above them stay."""
    text = out.read_text(encoding="utf-8") if out.exists() else "# Performance\n\n"
    head = text.partition("<!-- ")[0]
    sections = dict(re.findall(r"<!-- (.+?) -->\n(.*?)<!-- end -->\n", text, re.DOTALL))
    sections[f"{script} on {kind()}"] = "\n".join([f"## `bench/{script}` on {kind()}\n", machine(), *lines]) + "\n\n"

    def place(name: str) -> tuple[int, str]:
        of = name.split(" on ")[0]
        return ORDER.index(of) if of in ORDER else len(ORDER), name

    known = sorted(sections, key=place)
    body = "".join(f"<!-- {name} -->\n{sections[name]}<!-- end -->\n" for name in known)
    out.write_text(head + body, encoding="utf-8")


def kind() -> str:
    """What sets this machine apart from others that the page may have figures of."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()}{' with AMX' if torch.cpu.get_capabilities().get('amx_bf16') else ''}"


def cpu_name() -> str:
    caps: Any = torch.cpu.get_capabilities()
    return caps.get("cpu_name") or platform.processor() or "unknown CPU"


def machine() -> str:
    """One line on what this ran on, and when."""
    caps: Any = torch.cpu.get_capabilities()
    known = " and ".join(name for name in ("avx512_bf16", "amx_bf16") if caps.get(name)) or "no bf16 instructions"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    numba = "yes" if find_spec("numba") else "no"
    return (
        f"{cpu_name()}, {torch.get_num_threads()} threads, {known}{gpu}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, numba {numba}; load at the end {load}; {date.today()}."
    )


def memory(way: Way) -> int:
    """Bytes that one call adds to the peak of the resident memory; 0 where the system does not tell."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return 0
    gc.collect()
    clear.write_text("5")
    before = _status(status, "VmRSS")
    way()
    return _status(status, "VmHWM") - before


def _status(status: Path, name: str) -> int:
    return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(name))) * 1024


def stub_for_dictionary_learning() -> None:
    """What its package imports for collecting activations and reading text, which nothing here does."""
    for name, member in {
        "nnsight": "LanguageModel",
        "datasets": "load_dataset",
        "zstandard": "ZstdDecompressor",
    }.items():
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            setattr(sys.modules[name], member, object)


def tensors(d_model: int, d_sae: int, n: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Residuals with two massive dimensions and a first token of 100 times the norm; random features; their bias."""
    g = torch.Generator(device).manual_seed(0)
    W = torch.randn(d_sae, d_model, generator=g, device=device).div_(d_model**0.5)
    x = torch.randn(n, d_model, generator=g, device=device)
    x[:, [11, 1000]] *= 30
    x[0] *= 100
    return x, W, torch.randn(d_sae, generator=g, device=device) * 0.1


def random_model(config: Any) -> Any:
    """A language model of this shape with random weights in bf16, which no gradient reaches."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def bare_product(x: torch.Tensor, W: torch.Tensor) -> Way:
    """The floor: the bf16 product alone, in tiles of our size, each written over the one before."""
    low, W_low = x.bfloat16(), W.bfloat16()
    step = 512 if x.device.type == "cpu" else 4096
    room = torch.empty(step, len(W), dtype=torch.bfloat16, device=x.device)

    def product() -> None:
        for tile in low.split(step):
            torch.mm(tile, W_low.T, out=room[: len(tile)])

    return product


def add_peers(ways: dict[str, Way], makers: Mapping[str, Callable[..., Way]], *arguments: Any) -> None:
    """The peers that are installed."""
    for name, make in makers.items():
        try:
            ways[name] = make(*arguments)
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)

"""What encode launches on a GPU and how many bytes it moves there, counted where there is none.

    python bench/gpu_bytes.py [--rows 64]

The CUDA path runs in Triton's interpreter on a few rows of a released shape. PyTorch's operations are counted as they
are called, each with the bytes of all its tensors, as if nothing stayed in a cache between two of them; compiled rows
count what their code reads and writes. Bytes that grow with the rows are scaled to 4,096 of them; the weights that the
product reads are counted once.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

from side_by_side import PAGE, markdown, tensors, write

import torch  # isort: skip
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # isort: skip
from torch.utils._pytree import tree_leaves  # isort: skip

from qwen_scope.sae.kernels import bound, rows_triton, screened  # isort: skip

D_MODEL, D_SAE, K, ROWS = 2048, 32768, 100, 4096
# Operations that move fewer megabytes are shown together.
SMALL = 50
# Operations of these names start nothing on a GPU.
FREE = {
    "alias", "detach", "empty", "expand", "permute", "select", "slice", "split", "t", "unbind", "unsqueeze", "view",
    "_unsafe_view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts what starts a kernel, and the bytes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.found[name].append(size(tree_leaves((args, kwargs, out))))
        return out


def size(leaves: list[Any]) -> int:
    """Bytes of the tensors among these, each storage that is both read and written counted twice."""
    return sum(t.numel() * t.element_size() for t in leaves if isinstance(t, torch.Tensor))


class Counted:
    """A compiled row that says how often it was started and what it moves."""

    def __init__(self, kernel: Any, moves: Callable[..., int], launches: Launches, name: str) -> None:
        self.kernel, self.moves, self.launches, self.name = kernel, moves, launches, name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def start(*args: Any) -> None:
            with _disable_current_modes():
                self.kernel[grid](*args)
                self.launches.found[self.name].append(self.moves(*args))

        return start


def lower_bounds(low: Any, terms: Any, per_group: Any, out: Any, *_: Any) -> int:
    return size([low, terms, out]) + len(low) * size([per_group])


def candidates(low: Any, terms: Any, per_feature: Any, per_group: Any, floor: Any, out: Any, *rest: Any) -> int:
    counts = rest[2]
    found = int(counts.clamp(max=out.shape[1]).sum())
    # Each row reads the bounds of all groups once for every member that they have.
    of_groups = len(low) * size([per_group]) * (len(per_feature) // len(per_group))
    return size([low, terms, floor, counts]) + of_groups + found * (16 + 12)


def dots(left: Any, right: Any, bias: Any, index: Any, wanted: Any, out: Any, width: int, *_: Any) -> int:
    return int(wanted.sum()) * (width * right.element_size() + 12) + size([left, wanted])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=64)
    n = parser.parse_args().rows
    x, W, b = tensors(D_MODEL, D_SAE, n)[:3]
    screen = bound.prepare(W, b)
    wanted, _ = screened.encode_topk_screened(x, W, b, K, screen, use_triton=False)
    launches = Launches()
    for name, moves in (("lower_bounds", lower_bounds), ("candidates", candidates), ("dots", dots)):
        setattr(rows_triton, name, Counted(getattr(rows_triton, name), moves, launches, name))
    with launches:
        found, stats = screened.encode_topk_screened(x, W, b, K, screen, use_triton=True)
    assert torch.equal(found.indices, wanted.indices), "the CUDA path must find the features of the CPU's"
    weights = {"mm": size([screen.low])}
    rows = []
    for name, moved in launches.found.items():
        fixed = weights.get(name, 0)
        rows.append((f"`{name}`", len(moved), (fixed + (sum(moved) - fixed) * ROWS / n) / 2**20))
    rows.sort(key=lambda row: -row[2])
    small = [row for row in rows if row[2] < SMALL]
    shown = [*rows[: -len(small)], (f"{len(small)} others", sum(row[1] for row in small), sum(row[2] for row in small))]
    shown.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    work = 2 * ROWS * screen.low.numel()
    lines = [
        "", f"### {ROWS:,} tokens, d_model {D_MODEL:,}, d_sae {D_SAE:,}, k {K}, fp32, one tile", "",
        f"Counted on {n} rows with {stats.candidates / n:.0f} candidates each, in Triton's interpreter: no GPU was at "
        f"hand. The bf16 product takes {work / 1e9:,.0f} GFLOP.", "",
        markdown(["operation", "launches", "MB"], [(name, count, f"{size:,.0f}") for name, count, size in shown]),
    ]  # fmt: skip
    print("\n".join(lines))
    write("gpu_bytes.py", lines, PAGE)


if __name__ == "__main__":
    main()

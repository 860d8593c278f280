"""Encode of 1 to 32 rows, as in generation and serving, beside sae_lens and one fp32 product of the same rows.

    python bench/small_batches.py [--rounds 9]

Weights of 256 MB are read once however few rows there are, so the product shows the floor.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from encode import agree, sae_lens_way
from side_by_side import PAGE, Way, add_peers, alternate, markdown, ratio, tensors, write

import torch  # isort: skip

from qwen_scope.sae import TopK  # isort: skip

D_MODEL, D_SAE, K = 2048, 32768, 50
ROWS = (1, 2, 4, 8, 16, 32)
CALLS = 5
COLUMNS = ("rows", "qwen-scope, ms", "sae_lens, ms", "fp32 product, ms", "sae_lens / ours", "ours / product", "")


def repeated(way: Way) -> Way:
    def several() -> None:
        for _ in range(CALLS):
            way()

    return several


def measure(rows: int, rounds: int, weights: tuple[torch.Tensor, ...], sae: TopK) -> list[object]:
    """A row of the table; the answers are compared first."""
    x, W, b = weights
    x = x[1 : rows + 1]  # without the first token of a hundred times the norm
    ways: dict[str, Way] = {"qwen-scope": lambda: sae.encode(x)}
    add_peers(ways, {"sae_lens": sae_lens_way}, x, W, b, K)
    if "sae_lens" in ways:
        agree("sae_lens", ways["sae_lens"](), sae.encode(x), x, sae)
    ways["product"] = lambda: torch.nn.functional.linear(x, W, b)
    times = alternate({name: repeated(way) for name, way in ways.items()}, rounds)
    median = {name: f"{1000 * statistics.median(seconds) / CALLS:.1f}" for name, seconds in times.items()}
    peer = ratio(times, "sae_lens", "qwen-scope") if "sae_lens" in times else float("nan")
    verdict = "" if peer != peer or peer >= 1 else "**slower**"
    cells = [median["qwen-scope"], median.get("sae_lens", ""), median["product"]]
    return [rows, *cells, peer, ratio(times, "qwen-scope", "product"), verdict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    x, W, b = tensors(D_MODEL, D_SAE, max(ROWS) + 1)
    sae = TopK(W, W.T, b, b.new_zeros(D_MODEL), k=K)
    found = [measure(rows, args.rounds, (x, W, b), sae) for rows in ROWS]
    words = (
        f"An SAE of shape (d_model {D_MODEL:,}, d_sae {D_SAE:,}), k {K}, in fp32; medians of {args.rounds} rounds of"
        f" {CALLS} calls, in turn. Wanted: no size slower than sae_lens."
    )
    write("small_batches.py", [words, "", markdown(COLUMNS, found)], args.out)


if __name__ == "__main__":
    main()

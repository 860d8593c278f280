"""The choice of `screened.choose_candidates`, compiled by numba where the extra `fast` is installed.

One pass over each row while it is in cache, and candidates recomputed where they stand: PyTorch's sampled product
reads the same rows of W_enc more than twice as slowly.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .bound import ROUND_OUT, Rows, Screen
from .candidates import PER_ROW, PER_SLOT, Candidates

# Rows of one task of a thread.
CHUNK = 16


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether numba can be imported."""
    return find_spec("numba") is not None


def reads(W_enc: Tensor) -> bool:
    """Whether the compiled kernel is there and reads this type of weights."""
    return available() and W_enc.dtype in (torch.float32, torch.bfloat16)


def choose(low: Tensor, rows: Rows, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, screen: Screen) -> Candidates:
    """What `screened.choose_candidates` does, row by row."""
    from .rows_numba import choose_rows

    n = len(low)
    values = torch.zeros(n, k)
    features = torch.zeros(n, k, dtype=torch.int32)
    candidates = torch.zeros(n, dtype=torch.int64)
    half = W_enc.dtype == torch.bfloat16
    weights, none = W_enc.detach(), torch.empty(0, W_enc.shape[1])
    arguments: list[Any] = [
        t.detach().numpy()
        for t in (
            low.view(torch.int16),
            rows.terms,
            rows.covered,
            screen.per_feature,
            screen.per_group,
            x,
            none if half else weights,
            weights.view(torch.int16) if half else none.to(torch.int16),
            b_enc.float(),
            values,
            features,
            candidates,
        )
    ]
    threads = torch.get_num_threads()
    spans = [(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]
    budget = PER_SLOT * k + PER_ROW
    if threads == 1 or len(spans) < 2:
        choose_rows(0, n, k, budget, ROUND_OUT, *arguments)
    else:
        with ThreadPoolExecutor(threads) as pool:
            tasks = [pool.submit(choose_rows, *span, k, budget, ROUND_OUT, *arguments) for span in spans]
            for task in tasks:
                task.result()
    # A row that was given up has -1.
    return Candidates(values, features, candidates >= 0, int(candidates.clamp(min=0).sum()))

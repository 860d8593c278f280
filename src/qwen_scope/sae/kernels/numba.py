"""The choice of `screened.choose_candidates`, compiled by numba where the extra `fast` is installed.

One pass over each row of the product while it is in cache, and candidates recomputed where they stand: PyTorch's
sampled product reads the same rows of W_enc more than twice as slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bound import ROUND_OUT, Screen
from .candidates import PER_ROW, PER_SLOT, Candidates, Tiles

# Rows, or features, of one task of a thread.
ROWS, FEATURES = 16, 512
# Rows recomputed together, by the room that their fp32 numbers take; candidates take about 13 kB a row at k 100.
CACHED_BYTES, FEWEST_AT_ONCE, MOST_AT_ONCE = 2**24, 512, 2048


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether numba can be imported."""
    return find_spec("numba") is not None


def reads(W_enc: Tensor) -> bool:
    """Whether the compiled kernel is there and reads this type of weights."""
    return available() and W_enc.dtype in (torch.float32, torch.bfloat16)


def rows_at_once(W_enc: Tensor) -> int:
    """How many rows are recomputed together: more read the weights less often, and must stay in the cache."""
    return max(FEWEST_AT_ONCE, min(MOST_AT_ONCE, CACHED_BYTES // (4 * W_enc.shape[1])))


def choose(tiles: Tiles, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, screen: Screen) -> Candidates:
    """What `screened.choose_candidates` does, for the rows of several tiles.

    Candidates are found row by row, while a tile is in the cache, and recomputed feature by feature: a feature's
    weights are read once for all rows. The k most probable of a row come first, and their k-th largest value is the
    floor for the rest.
    """
    from . import rows_numba as compiled

    n, d_sae = len(x), len(W_enc)
    room = min(PER_SLOT * k + PER_ROW, d_sae)
    values, features = torch.zeros(n, k), torch.zeros(n, k, dtype=torch.int32)
    none = torch.empty(0, W_enc.shape[1])
    single, half = (none, W_enc.detach()) if W_enc.dtype == torch.bfloat16 else (W_enc.detach(), none.bfloat16())
    factors = [t.numpy() for t in (x, single, half.view(torch.int16), b_enc.detach().float())]
    which, near, reach = np.empty((n, room), np.int32), np.empty((n, room), np.float32), np.empty((n, room), np.float32)
    counts, likely = np.empty(n, np.int64), np.empty(n, np.int64)
    bounds = [t.numpy() for t in (screen.per_feature, screen.per_group.T.contiguous())]
    with tasks() as share:
        first = 0
        for low, rows in tiles:
            tile = [t.numpy() for t in (low.view(torch.int16), rows.terms, rows.covered)]
            of_tile = [part[first : first + len(low)] for part in (which, near, reach, counts, likely)]
            share(compiled.candidates, len(low), ROWS, k, ROUND_OUT, *tile, *bounds, d_sae, *of_tile)
            first += len(low)
        # Recomputed values take the place of what the bf16 product said.
        entries = compiled.by_feature(which, np.zeros_like(likely), likely, d_sae)
        share(compiled.recompute, d_sae, FEATURES, *entries, *factors, near)
        share(compiled.keep_reaching, n, ROWS, k, which, near, reach, counts, likely)
        entries = compiled.by_feature(which, likely, counts, d_sae)
        share(compiled.recompute, d_sae, FEATURES, *entries, *factors, near)
        share(compiled.put_largest, n, ROWS, k, which, near, reach, counts, values.numpy(), features.numpy())
    # A row that was given up has -1.
    found = torch.from_numpy(counts)
    return Candidates(values, features, found >= 0, int(found.clamp(min=0).sum()))


@contextmanager
def tasks() -> Iterator[Callable[..., None]]:
    """`share(function, total, step, *rest)` calls `function(start, stop, *rest)` for 0 to total, by all threads."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def share(function: Callable[..., Any], total: int, step: int, *rest: Any) -> None:
        if pool is None or total <= step:
            function(0, total, *rest)
            return
        for done in [pool.submit(function, at, min(at + step, total), *rest) for at in range(0, total, step)]:
            done.result()

    try:
        yield share
    finally:
        if pool is not None:
            pool.shutdown()

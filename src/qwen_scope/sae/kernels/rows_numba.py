"""The compiled rows of `numba.choose`; the only module that imports numba."""

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap
from typing import Any

import numba
import numpy as np


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile on first call, without the interpreter's lock; kept on disk where numba finds a place for it."""
    function = unwrap(function)  # a checker of signatures can't be compiled
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # no folder can be written to
        return numba.njit(nogil=True, **options)(function)


def _dot4(x: Any, w0: Any, w1: Any, w2: Any, w3: Any) -> Any:
    """Four sums of products, all in the same order, so that equal features have equal values."""
    a0, a1, a2, a3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(len(x)):
        v = x[i]
        a0 += v * w0[i]
        a1 += v * w1[i]
        a2 += v * w2[i]
        a3 += v * w3[i]
    return a0, a1, a2, a3


# A sum of products may be taken in any order: the bound holds for all of them.
dot4 = jit(_dot4, fastmath={"reassoc", "contract", "nsz"})


def _widen(half: Any, out: Any) -> None:
    """bf16 numbers are the upper halves of fp32 ones."""
    for i in range(len(out)):
        out[i] = np.int32(half[i]) << 16


widen = jit(_widen)


def _recompute(x: Any, W: Any, W_half: Any, bias: Any, which: Any, first: int, last: int, exact: Any) -> None:
    """Fill `exact[first:last]` with the fp32 pre-activations of `which[first:last]`; both have room for three more."""
    for i in range(last, last + 3):
        which[i] = which[last - 1]
    scratch = np.empty((4, len(x) if len(W_half) else 0), np.int32)
    wide = scratch.view(np.float32)
    for start in range(first, last, 4):
        f0, f1, f2, f3 = which[start], which[start + 1], which[start + 2], which[start + 3]
        if len(W_half):
            widen(W_half[f0], scratch[0])
            widen(W_half[f1], scratch[1])
            widen(W_half[f2], scratch[2])
            widen(W_half[f3], scratch[3])
            a0, a1, a2, a3 = dot4(x, wide[0], wide[1], wide[2], wide[3])
        else:
            a0, a1, a2, a3 = dot4(x, W[f0], W[f1], W[f2], W[f3])
        exact[start] = a0 + bias[f0]
        exact[start + 1] = a1 + bias[f1]
        exact[start + 2] = a2 + bias[f2]
        exact[start + 3] = a3 + bias[f3]


recompute = jit(_recompute)


def _group_maxima(row: Any, best: Any) -> None:
    """The largest member of each group as raw bf16 bits, none below zero: in that range integers keep the order."""
    groups = len(best)
    best[:] = 0
    for start in range(0, len(row), groups):
        # A slice, and no `max`: otherwise this is compiled to one number at a time.
        members = row[start : start + groups]
        for g in range(groups):
            one, other = members[g], best[g]
            best[g] = one if one > other else other


group_maxima = jit(_group_maxima)


# numpy's own selection and sorting take numba four times as long to compile as all the rest.
def _kth_largest(values: Any, k: int) -> Any:
    """Hoare's selection, on a copy."""
    a = values.copy()
    left, right, wanted = 0, len(a) - 1, k - 1
    while left < right:
        pivot = a[(left + right) // 2]
        i, j = left, right
        while i <= j:
            while a[i] > pivot:
                i += 1
            while a[j] < pivot:
                j -= 1
            if i <= j:
                a[i], a[j] = a[j], a[i]
                i += 1
                j -= 1
        if wanted <= j:
            right = j
        elif wanted >= i:
            left = i
        else:
            break
    return a[wanted]


kth_largest = jit(_kth_largest)


def _put_in_order(values: Any, features: Any, n: int) -> None:
    """Sort the first n by descending value, equal ones by feature: Shell's sort with gaps of thirds."""
    gap = 1
    while gap < n // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for i in range(gap, n):
            value, feature, j = values[i], features[i], i
            while j >= gap:
                other = values[j - gap]
                if other > value or (other == value and features[j - gap] < feature):
                    break
                values[j], features[j] = other, features[j - gap]
                j -= gap
            values[j], features[j] = value, feature
        gap //= 3


put_in_order = jit(_put_in_order)


def _candidates(
    row: Any, terms: Any, per_feature: Any, per_group: Any, d_sae: int, k: int, round_out: Any, which: Any, approx: Any,
    reach: Any,
) -> int:  # fmt: skip
    """Fill in every feature that could reach the floor under the k-th largest; -1 where there is no room for all."""
    groups = len(per_group)
    best = np.empty(groups, np.int16)
    group_maxima(row, best)
    bits = np.empty(groups, np.int32)
    widen(best, bits)
    top = bits.view(np.float32)
    slack = np.empty(groups, np.float32)
    lower = np.empty(groups, np.float32)
    for g in range(groups):
        p = per_group[g]
        slack[g] = terms[0] * p[0] + terms[1] * p[1] + terms[2] * p[2] + p[3]
        lower[g] = top[g] * (np.float32(1) - round_out) - slack[g]
    floor = max(kth_largest(lower, k), np.float32(0))
    one_bits = np.empty(1, np.int32)
    one = one_bits.view(np.float32)
    found, room = 0, len(which) - 3
    for g in range(groups):
        if top[g] * (np.float32(1) + round_out) + slack[g] < floor:
            continue
        for j in range(g, min(len(row), d_sae), groups):
            one_bits[0] = np.int32(row[j]) << 16
            value = one[0]
            near = value + abs(value) * round_out
            if near + slack[g] < floor:
                continue
            p = per_feature[j]
            highest = near + (terms[0] * p[0] + terms[1] * p[1] + terms[2] * p[2] + p[3])
            if highest < floor:
                continue
            if found == room:
                return -1
            which[found], approx[found], reach[found] = j, value, highest
            found += 1
    return found


candidates = jit(_candidates)


def _choose_rows(
    start: int, stop: int, k: int, budget: int, round_out: float, low: Any, terms: Any, covered: Any, per_feature: Any,
    per_group: Any, x: Any, W: Any, W_half: Any, bias: Any, values: Any, features: Any, counts: Any,
) -> None:  # fmt: skip
    """Rows `start` to `stop`: the k largest by way of candidates; `counts` is -1 where there were too many."""
    rounding = np.float32(round_out)
    which = np.empty(budget + 3, np.int64)
    approx = np.empty(budget + 3, np.float32)
    reach = np.empty(budget + 3, np.float32)
    order = np.empty(budget + 3, np.int64)
    exact = np.empty(budget + 3, np.float32)
    for r in range(start, stop):
        counts[r] = -1
        if not covered[r]:
            continue
        n = candidates(low[r], terms[r], per_feature, per_group, len(bias), k, rounding, which, approx, reach)
        if n < 0:
            continue
        counts[r] = 0
        if n == 0:
            continue
        # The most probable first: their fp32 values raise the floor for the rest.
        likely = kth_largest(approx[:n], k) if n > k else -np.inf
        first, done = np.int64(0), np.int64(0)
        for i in range(n):
            if approx[i] >= likely:
                order[done] = which[i]
                done += 1
        recompute(x[r], W, W_half, bias, order, first, done, exact)
        floor = max(kth_largest(exact[:done], k), np.float32(0)) if n > k else np.float32(0)
        first = done
        for i in range(n):
            if approx[i] < likely and reach[i] >= floor:
                order[done] = which[i]
                done += 1
        if done > first:
            recompute(x[r], W, W_half, bias, order, first, done, exact)
        counts[r] = done
        put_in_order(exact, order, done)
        for slot in range(min(k, done)):
            if exact[slot] > 0:
                values[r, slot], features[r, slot] = exact[slot], order[slot]


choose_rows = jit(_choose_rows)

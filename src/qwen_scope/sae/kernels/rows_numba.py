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


def _kth_largest(bits: Any, k: int) -> Any:
    """The k-th largest of fp32 numbers given by their bits, itself as bits; 0 where fewer than k are positive.

    In that range integers keep the order, so the answer is found by halving, each step one count at vector speed; a
    selection that moves numbers would wait for every branch.
    """
    low, high = np.int32(0), np.int32(0x7F800001)
    while high - low > 1:
        middle = np.int32(low + (high - low) // 2)
        count = np.int32(0)
        for i in range(len(bits)):
            count += np.int32(bits[i] >= middle)
        if count >= k:
            low = middle
        else:
            high = middle
    return low


kth_largest = jit(_kth_largest)


# numpy's own sorting takes numba four times as long to compile as all the rest.
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
    start: int, stop: int, k: int, round_out: float, low: Any, terms: Any, covered: Any, per_feature: Any,
    per_group: Any, d_sae: int, which: Any, near: Any, reach: Any, counts: Any, likely: Any,
) -> None:  # fmt: skip
    """The features of rows `start` to `stop` that could reach the floor under the k-th largest.

    `counts` says how many a row has, -1 where it is not covered or has no room for all; the `likely[row]` most probable
    of them, at least k if there are as many, come first.
    """
    rounding = np.float32(round_out)
    groups, room = per_group.shape[1], which.shape[1]
    p0, p1, p2, p3 = per_group[0], per_group[1], per_group[2], per_group[3]
    best = np.empty(groups, np.int16)
    bits = np.empty(groups, np.int32)
    top = bits.view(np.float32)
    slack = np.empty(groups, np.float32)
    lower = np.empty(groups, np.float32)
    lower_bits = lower.view(np.int32)
    least = np.empty(groups, np.float32)
    least_bits = least.view(np.int32)
    least_half = np.empty(groups, np.int16)
    passes = np.zeros((groups + 7) // 8 * 8, np.uint8)
    eights = passes.view(np.int64)
    one_bits = np.empty(1, np.int32)
    one = one_bits.view(np.float32)
    for r in range(start, stop):
        counts[r], likely[r] = -1, 0
        if not covered[r]:
            continue
        row = low[r]
        t0, t1, t2 = terms[r, 0], terms[r, 1], terms[r, 2]
        group_maxima(row, best)
        widen(best, bits)
        for g in range(groups):
            s = t0 * p0[g] + t1 * p1[g] + t2 * p2[g] + p3[g]
            slack[g] = s
            lower[g] = top[g] * (np.float32(1) - rounding) - s
        one_bits[0] = kth_largest(lower_bits, k)
        floor = one[0]
        # What a member's bf16 number must be for its group's bound to reach the floor: a little less than that, so
        # that rounding here rules nothing out, and any number at all where the bound alone reaches it.
        for g in range(groups):
            least[g] = (floor - slack[g]) * np.float32(1 - 2.0**-7)
        for g in range(groups):
            half = least_bits[g] >> 16
            least_half[g] = np.int16(half) if half > 0 else np.int16(-32768)
        found = 0
        for slab in range(0, len(row), groups):
            members = row[slab : slab + groups]
            for g in range(groups):
                passes[g] = members[g] >= least_half[g]
            for eight in range(len(eights)):
                if eights[eight] == 0:
                    continue
                for g in range(8 * eight, 8 * eight + 8):
                    j = slab + g
                    if passes[g] == 0 or j >= d_sae:
                        continue
                    one_bits[0] = np.int32(members[g]) << 16
                    value = one[0]
                    p = per_feature[j]
                    highest = value + abs(value) * rounding + (t0 * p[0] + t1 * p[1] + t2 * p[2] + p[3])
                    if highest < floor:
                        continue
                    if found < room:
                        which[r, found], near[r, found], reach[r, found] = j, value, highest
                    found += 1
        if found > room:
            continue
        counts[r] = likely[r] = found
        if found > k:
            one_bits[0] = kth_largest(near[r, :found].view(np.int32), k)
            likely[r] = first_where(near[r, :found], one[0], which[r], reach[r])


def _first_where(values: Any, least: float, which: Any, reach: Any) -> int:
    """Bring entries of at least `least` to the front; how many they are."""
    done = 0
    for i in range(len(values)):
        if values[i] >= least:
            values[i], values[done] = values[done], values[i]
            which[i], which[done] = which[done], which[i]
            reach[i], reach[done] = reach[done], reach[i]
            done += 1
    return done


first_where = jit(_first_where)
candidates = jit(_candidates)


def _by_feature(which: Any, first: Any, last: Any, d_sae: int) -> Any:
    """Entries `first[row]` to `last[row]` of each row in order of their features.

    Returns where each feature's entries begin, and of each entry its row and its slot.
    """
    starts = np.zeros(d_sae + 1, np.int64)
    for r in range(len(which)):
        for slot in range(first[r], last[r]):
            starts[which[r, slot] + 1] += 1
    for f in range(d_sae):
        starts[f + 1] += starts[f]
    rows, slots = np.empty(starts[d_sae], np.int32), np.empty(starts[d_sae], np.int32)
    free = starts[:-1].copy()
    for r in range(len(which)):
        for slot in range(first[r], last[r]):
            f = which[r, slot]
            rows[free[f]], slots[free[f]] = r, slot
            free[f] += 1
    return starts, rows, slots


by_feature = jit(_by_feature)


def _recompute(
    first: int, last: int, starts: Any, rows: Any, slots: Any, x: Any, W: Any, W_half: Any, bias: Any, exact: Any
) -> None:
    """Fill `exact[row, slot]` of the entries of features `first` to `last` with their fp32 pre-activations."""
    scratch = np.empty(x.shape[1] if len(W_half) else 0, np.int32)
    wide = scratch.view(np.float32)
    for f in range(first, last):
        stop = starts[f + 1]
        if starts[f] == stop:
            continue
        w = wide
        if len(W_half):
            widen(W_half[f], scratch)
        else:
            w = W[f]
        for i in range(starts[f], stop, 4):
            # What is missing from the last four is the last one again.
            i1, i2, i3 = min(i + 1, stop - 1), min(i + 2, stop - 1), min(i + 3, stop - 1)
            a0, a1, a2, a3 = dot4(w, x[rows[i]], x[rows[i1]], x[rows[i2]], x[rows[i3]])
            exact[rows[i], slots[i]] = a0 + bias[f]
            exact[rows[i1], slots[i1]] = a1 + bias[f]
            exact[rows[i2], slots[i2]] = a2 + bias[f]
            exact[rows[i3], slots[i3]] = a3 + bias[f]


recompute = jit(_recompute)


def _keep_reaching(start: int, stop: int, k: int, which: Any, exact: Any, reach: Any, counts: Any, likely: Any) -> None:
    """Of what is not recomputed yet, keep what could reach the k-th largest recomputed value; `counts` follows."""
    one_bits = np.empty(1, np.int32)
    one = one_bits.view(np.float32)
    for r in range(start, stop):
        done = likely[r]
        if counts[r] <= done:
            continue
        one_bits[0] = kth_largest(exact[r, :done].view(np.int32), k)
        kept = done
        for i in range(done, counts[r]):
            if reach[r, i] >= one[0]:
                which[r, kept] = which[r, i]
                kept += 1
        counts[r] = kept


keep_reaching = jit(_keep_reaching)


def _put_largest(
    start: int, stop: int, k: int, which: Any, exact: Any, reach: Any, counts: Any, values: Any, features: Any
) -> None:
    """The k largest recomputed values of each row, in order; all three of its entries' arrays are moved about."""
    one_bits = np.empty(1, np.int32)
    one = one_bits.view(np.float32)
    for r in range(start, stop):
        n = counts[r]
        if n <= 0:
            continue
        if n > k:
            one_bits[0] = kth_largest(exact[r, :n].view(np.int32), k)
            n = first_where(exact[r, :n], one[0], which[r], reach[r])
        put_in_order(exact[r], which[r], n)
        for slot in range(min(k, n)):
            if exact[r, slot] > 0:
                values[r, slot], features[r, slot] = exact[r, slot], which[r, slot]


put_largest = jit(_put_largest)

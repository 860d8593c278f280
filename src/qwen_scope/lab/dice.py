"""Chance and membership that stay the same on every machine and Python version.

Only `Random.random` is promised to be stable between Python versions, so every draw goes through it; membership of
a hold-out comes from a cryptographic hash of the thing itself, so that no sampling seed can change it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")


def digest(text: str) -> int:
    """A stable 64-bit number for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@lru_cache(maxsize=1 << 18)
def share(text: str) -> float:
    """A stable number in [0, 1) for a text: below p for a share p of all texts."""
    return digest(text) / 2**64


class Dice:
    """A stream of choices that depends on its key alone."""

    def __init__(self, key: str) -> None:
        self._random = random.Random(digest(key)).random

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """A number from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return self._random() < p

    def pick(self, items: Sequence[T]) -> T:
        """One item, all equally likely."""
        return items[int(self._random() * len(items))]

    def weighted(self, weights: Mapping[str, float]) -> str:
        """One key, with probability in proportion to its weight."""
        left = self._random() * sum(weights.values())
        last = ""
        for key, weight in weights.items():
            if weight > 0:
                last = key
                left -= weight
                if left < 0:
                    break
        return last

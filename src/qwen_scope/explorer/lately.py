"""What was seen lately, kept by bytes or by number."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from qwen_scope.scope import TokenFeatures

T = TypeVar("T")


class Lately(Generic[T]):
    """The last few values by key; safe to share between threads."""

    def __init__(self, most: int) -> None:
        self._most, self._held, self._lock = most, OrderedDict[Hashable, T](), threading.Lock()

    def get(self, key: Hashable) -> T | None:
        """The value, or None if it is no longer known."""
        with self._lock:
            return self._held.get(key)

    def put(self, key: Hashable, value: T) -> None:
        """Remember a value; the oldest leaves where there are too many."""
        with self._lock:
            self._held[key] = value
            while len(self._held) > self._most:
                self._held.popitem(last=False)


def size_of(found: TokenFeatures) -> int:
    """Bytes of the tensors of what was seen."""
    tensors = [t for acts in found.acts.values() for t in (acts.indices, acts.values)]
    return sum(t.numel() * t.element_size() for t in [*tensors, *found.reasons.values(), found.input_ids, found.mask])

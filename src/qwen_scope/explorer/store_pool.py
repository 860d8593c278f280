"""Stores that stay open between two clicks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_scope.store import FeatureStore

KEPT = 2
"""Stores that stay open at most; each may keep `MEMORY` of what it has read."""

MEMORY = "500MB"

Stamp = tuple[int, int]


def stamp(path: Path) -> Stamp:
    """When a file was last written, and how large it is; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


class StorePool:
    """Lends opened stores, each to one borrower at a time; the last few that came back wait for the next one."""

    def __init__(self) -> None:
        self._free: list[tuple[Path, Stamp, FeatureStore]] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._free)

    @contextmanager
    def lent(self, folder: Path) -> Iterator[FeatureStore]:
        """The store of a folder, opened anew where its manifest has changed; it must not be used after the block.

        Raises:
            NotFoundError: there is none.   FormatError: it is damaged.
        """
        written = stamp(folder / "manifest.json")
        store = self._taken(folder, written) or FeatureStore(folder, memory=MEMORY)
        try:
            yield store
        except BaseException:
            store.close()
            raise
        with self._lock:
            self._free.append((folder, written, store))
            old = self._free[:-KEPT]
            del self._free[:-KEPT]
        for *_, other in old:
            other.close()

    def _taken(self, folder: Path, written: Stamp) -> FeatureStore | None:
        """A free store of the folder, if its manifest is still the same."""
        with self._lock:
            for i, (place, made, store) in enumerate(self._free):
                if place == folder:
                    del self._free[i]
                    if made == written:
                        return store
                    store.close()
                    return None
        return None

"""`StoreWriter`: windows of documents become parts of a store, and a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32

from qwen_scope.errors import InputError, foreign
from qwen_scope.files import Remote, claim_folder, place, read_object, remove_folder, room, write_text

from .attempts import forget
from .index import check_disk, index_layer
from .layout import (
    MANIFEST,
    TABLES,
    WORK,
    LayerInfo,
    Manifest,
    Part,
    in_utf8,
)
from .part_file import write_part
from .request import check_same

PACKAGES = ("qwen-scope", "torch", "transformers", "pyarrow", "duckdb")


@dataclass(frozen=True, eq=False)
class LayerRows:
    """The activations of one layer in one window: rows sorted by document, position and feature.

    Attributes:
        document, position, feature: `(rows,)` int32.   value: `(rows,)` float32, above 0.
        tokens: how many tokens of the window count, that is are not masked.
    """

    document: Int32[np.ndarray, " rows"]
    position: Int32[np.ndarray, " rows"]
    feature: Int32[np.ndarray, " rows"]
    value: Float32[np.ndarray, " rows"]
    tokens: int


@dataclass(frozen=True, eq=False)
class Window:
    """What goes into a store at once.

    Attributes:
        layers: the activations by layer.
        tables: rows of `documents`, `spans`, `tokens`, `masked`, `unreadable` and `residuals`, in their schemas.
    """

    layers: Mapping[int, LayerRows]
    tables: Mapping[str, pa.Table]


class StoreWriter:
    """Writes one store. A window is in the store once its marker is; whatever a killed run left beyond is taken away.

    Args:
        folder: made where it does not exist; it may hold an unfinished store of the same request. At a URI parts and
            markers are whole objects, the manifest the last of them, and nothing is renamed.
        model: the source of the language model.
        request: plain data that decides the content of the store.
        layers: the layers and their SAEs, counts still 0.
        sources: where `model` and `saes` lie, from `place_of`; it decides nothing.

    Attributes:
        finished: whether there is nothing left to do.
        windows: how many are complete.
        state: of the last complete window, or None.

    Raises:
        InputError: the folder has other content, or a store of another request; another run writes to it now; or its
            path is not UTF-8.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: str,
        request: Mapping[str, Any],
        layers: Sequence[LayerInfo],
        sources: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.folder = place(folder)
        self.work = self.folder / WORK
        if isinstance(self.folder, Path):
            in_utf8(self.folder)  # refused before the work, not after it
        self.layers = {info.layer: info for info in sorted(layers, key=lambda info: info.layer)}
        self.model, self.request, self.sources = model, json.loads(json.dumps(request)), dict(sources or {})
        self.markers: list[dict[str, Any]] = []
        asked = {"model": model, "request": self.request, "layers": [asdict(info) for info in self.layers.values()]}
        self._held: ExitStack | None = None
        self._still: Callable[[], None] = lambda: None
        self.finished = (self.folder / MANIFEST).is_file()
        if self.finished:
            with foreign(f"{self.folder / MANIFEST} can't be read"):
                text = (self.folder / MANIFEST).read_text(encoding="utf-8")
            old = Manifest.from_json(text)
            bare = [asdict(replace(i, tokens=0, activations=0)) for i in old.layers.values()]
            check_same({"model": old.model, "request": old.request, "layers": bare}, asked, self.folder)
            self._tidy()
            return
        if self.folder.exists() and not (self.folder.is_dir() and (self.work.is_dir() or not _content(self.folder))):
            raise InputError(f"{self.folder} exists and is no unfinished store; name a new folder")
        with room(self.folder), ExitStack() as stack:
            self._still = stack.enter_context(claim_folder(self.folder))
            self._held = stack.pop_all()
            try:
                self._begin(asked)
            except BaseException:
                self.close()
                raise

    def _begin(self, asked: dict[str, Any]) -> None:
        request = self.work / "request.json"
        there = {path.name for path in self.work.glob("window-*.json")}
        while (marker := self._marker(len(self.markers))).name in there:
            self.markers.append(read_object(marker))
        if self.counts["tokens"] and request.is_file():
            check_same(read_object(request), asked, self.folder)
        else:  # nothing is finished, so nothing is lost by another request
            self._empty()
            self.work.mkdir(parents=True)
            write_text(request, json.dumps(asked, ensure_ascii=False))
        forget(self.folder)
        kept = {part["file"] for marker in self.markers for part in marker["parts"]}
        kept |= {part["file"] for path in self.work.glob("layer-*.json") for part in read_object(path)["parts"]}
        for table in TABLES:
            for path in (self.folder / table).glob("*"):
                if f"{table}/{path.name}" not in kept:
                    path.unlink()

    def _tidy(self) -> None:
        """Remove what a run left that was killed between its last file and its end, if nobody is still at work."""
        if self.work.exists() or (self.folder / ".lock").exists():
            with suppress(InputError), claim_folder(self.folder):
                remove_folder(self.work)

    def _empty(self) -> None:
        """Take away everything that was begun."""
        self.markers.clear()
        for name in (WORK, *TABLES):
            remove_folder(self.folder / name)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another run write here. A folder in which nothing is finished goes again."""
        held, self._held = self._held, None
        if held is None:
            return
        if not self.finished and not self.counts["tokens"]:
            self._empty()
        held.close()

    def _marker(self, window: int) -> Path | Remote:
        return self.work / f"window-{window:06d}.json"

    @property
    def windows(self) -> int:
        return len(self.markers)

    @property
    def state(self) -> dict[str, Any] | None:
        return self.markers[-1]["state"] if self.markers else None

    @property
    def counts(self) -> dict[str, int]:
        """Documents and tokens so far."""
        return {name: sum(marker[name] for marker in self.markers) for name in ("documents", "tokens")}

    @property
    def unreadable(self) -> dict[str, int]:
        """Rows of the corpus that could not be used so far, by reason."""
        total: Counter[str] = Counter()
        for marker in self.markers:
            total.update(marker["unreadable"])
        return dict(sorted(total.items()))

    def add(self, window: Window, state: Mapping[str, Any]) -> None:
        """Put a window into the store.

        Args:
            state: plain data from which the next window can be made; a run that goes on gets it back.

        Raises:
            InputError: the disk is full; what was there before is still there.
        """
        self.keep(write_window(self.folder, self.windows, window), state)

    def keep(self, written: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Take what `write_window` wrote, perhaps elsewhere, as the next window; raises as `add`."""
        text = json.dumps({**written, "state": dict(state)})
        with room(self.folder):
            self._still()
            write_text(self._marker(self.windows), text)
        self.markers.append(json.loads(text))

    def finish(self, *, memory: str = "1500MB") -> None:
        """Sort the activations by feature, take the statistics and write the manifest.

        Args:
            memory: how much the sort may take before it goes to disk.

        Raises:
            InputError: the disk is full, or has no room for the index; the next run goes on from here.
        """
        if self.finished:
            return
        parts = [Part(**part) for marker in self.markers for part in marker["parts"]]
        infos, first_row, first_part = {}, 0, 0
        unsorted = [layer for layer in self.layers if not (self.work / f"layer-{layer}.json").is_file()]
        with room(self.folder):
            check_disk(self.folder, [sum(m["layers"][str(layer)][1] for m in self.markers) for layer in unsorted])
            for number, (layer, info) in enumerate(self.layers.items()):
                marker = self.work / f"layer-{layer}.json"
                activations = sum(m["layers"][str(layer)][1] for m in self.markers)
                if not marker.is_file():
                    made = index_layer(self.folder, info, number, first_row, first_part, memory)
                    self._still()
                    write_text(marker, json.dumps({"parts": [asdict(part) for part in made]}))
                made = [Part(**part) for part in read_object(marker)["parts"]]
                parts += made
                first_row += activations
                first_part += sum(part.table == "features" for part in made)
                infos[layer] = replace(
                    info,
                    tokens=sum(m["layers"][str(layer)][0] for m in self.markers),
                    activations=activations,
                )
            order = list(TABLES)
            manifest = Manifest(
                model=self.model,
                request=self.request,
                layers=infos,
                **self.counts,
                unreadable=self.unreadable,
                parts=tuple(sorted(parts, key=lambda part: (order.index(part.table), part.file))),
                versions={name: version(name) for name in PACKAGES},
                sources={name: dict(place) for name, place in self.sources.items()},
            )
            self._still()
            write_text(self.folder / MANIFEST, manifest.to_json())
        self.finished = True
        remove_folder(self.work)
        self.close()


def write_window(folder: Path | Remote, number: int, window: Window) -> dict[str, Any]:
    """Write the parts of a window, which are of the store once a writer keeps what this returns: plain data.

    Raises:
        InputError: the disk is full; what was there before is still there.
    """
    with room(folder):
        parts = [write_part(folder, "activations", number, activation_tables(window.layers))]
        for name, table in window.tables.items():
            if table.num_rows:
                parts.append(write_part(folder, name, number, [table]))
    return {
        "parts": [asdict(part) for part in parts if part.rows],
        "documents": window.tables["documents"].num_rows,
        "tokens": window.tables["tokens"].num_rows,
        "unreadable": dict(Counter(window.tables["unreadable"]["reason"].to_pylist())),
        "layers": {str(layer): [rows.tokens, len(rows.value)] for layer, rows in window.layers.items()},
    }


def _content(folder: Path | Remote) -> bool:
    """Whether a folder holds anything but what a killed writer leaves."""
    return any(path.name != ".lock" and not path.name.startswith(".unfinished-") for path in folder.iterdir())


def activation_tables(layers: Mapping[int, LayerRows]) -> Iterator[pa.Table]:
    """The rows of every layer, layers in order."""
    for layer, rows in sorted(layers.items()):
        columns = [np.full(len(rows.value), layer, np.int32), rows.document, rows.position, rows.feature, rows.value]
        yield pa.Table.from_arrays([pa.array(c) for c in columns], schema=TABLES["activations"])

"""`StoreWriter`: windows of documents become parts of a store, and a run that was killed goes on where it stopped."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32

from qwen_scope.errors import InputError

from .layout import MANIFEST, ROW_GROUP, TABLES, TOKEN_GROUP, WORK, LayerInfo, Manifest, Part, part_name, part_writer

try:
    import fcntl
except ImportError:  # not on Windows: there two runs into one folder are not kept apart
    fcntl = None

PACKAGES = ("qwen-scope", "torch", "transformers", "pyarrow", "duckdb")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        tables: rows of `documents`, `tokens`, `masked`, `unreadable` and `residuals`, in their schemas.
    """

    layers: Mapping[int, LayerRows]
    tables: Mapping[str, pa.Table]


class StoreWriter:
    """Writes one store. A window is in the store once its marker is; whatever a killed run left beyond is taken away.

    Args:
        folder: made where it does not exist; it may hold an unfinished store of the same request.
        model: the source of the language model.
        request: plain data that decides the content of the store.
        layers: the layers and their SAEs, counts still 0.

    Attributes:
        finished: whether there is nothing left to do.
        windows: how many are complete.
        state: of the last complete window, or None.

    Raises:
        InputError: the folder holds something else, a store of another request, or another run writes to it now.
    """

    def __init__(
        self, folder: str | os.PathLike[str], model: str, request: Mapping[str, Any], layers: Sequence[LayerInfo]
    ) -> None:
        self.folder, self.work = Path(folder), Path(folder) / WORK
        self.layers = {info.layer: info for info in sorted(layers, key=lambda info: info.layer)}
        self.model, self.request = model, json.loads(json.dumps(request))
        asked = {"model": model, "request": self.request, "layers": [asdict(info) for info in self.layers.values()]}
        self.finished = False
        self._lock: IO[bytes] | None = None
        if (self.folder / MANIFEST).is_file():
            old = Manifest.from_json((self.folder / MANIFEST).read_text(encoding="utf-8"))
            bare = [asdict(replace(i, tokens=0, activations=0, median_norm=None)) for i in old.layers.values()]
            _same({"model": old.model, "request": old.request, "layers": bare}, asked, self.folder)
            self.finished = True
        elif (
            self.folder.exists() and not self.work.is_dir() and (not self.folder.is_dir() or any(self.folder.iterdir()))
        ):
            raise InputError(f"{self.folder} exists and is no unfinished store; name a new folder")
        with room(self.folder):
            try:
                self._begin(asked)
            except BaseException:
                self.close()
                raise

    def _begin(self, asked: dict[str, Any]) -> None:
        self.markers: list[dict[str, Any]] = []
        if self.finished:
            shutil.rmtree(self.work, ignore_errors=True)
            return
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = (self.work / "lock").open("wb")
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another run is writing to {self.folder} now") from None
        request = self.work / "request.json"
        if request.is_file():
            _same(json.loads(request.read_text(encoding="utf-8")), asked, self.folder)
        else:
            write_whole(request, json.dumps(asked, ensure_ascii=False))
        while (marker := self._marker(len(self.markers))).is_file():
            self.markers.append(json.loads(marker.read_text(encoding="utf-8")))
        kept = {part["file"] for marker in self.markers for part in marker["parts"]}
        kept |= {
            part["file"] for path in self.work.glob("layer-*.json") for part in json.loads(path.read_text())["parts"]
        }
        for table in TABLES:
            for path in (self.folder / table).glob("*"):
                if f"{table}/{path.name}" not in kept:
                    path.unlink()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another run write here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _marker(self, window: int) -> Path:
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
        number = self.windows
        with room(self.folder):
            parts = [write_part(self.folder, "activations", number, activation_tables(window.layers))]
            for name, table in window.tables.items():
                if table.num_rows:
                    parts.append(write_part(self.folder, name, number, [table]))
            marker = {
                "parts": [asdict(part) for part in parts if part.rows],
                "documents": window.tables["documents"].num_rows,
                "tokens": window.tables["tokens"].num_rows,
                "unreadable": Counter(window.tables["unreadable"]["reason"].to_pylist()),
                "layers": {str(layer): [rows.tokens, len(rows.value)] for layer, rows in window.layers.items()},
                "state": dict(state),
            }
            text = json.dumps(marker)
            write_whole(self._marker(number), text)
        self.markers.append(json.loads(text))

    def finish(self, medians: Mapping[int, float | None] | None = None, *, memory: str = "1500MB") -> None:
        """Sort the activations by feature, take the statistics and write the manifest.

        Args:
            medians: per layer the median norm that sinks were measured against.
            memory: how much the sort may take before it goes to disk.

        Raises:
            InputError: the disk is full; the next run goes on from here.
        """
        from .index import index_layer

        if self.finished:
            return
        parts = [Part(**part) for marker in self.markers for part in marker["parts"]]
        infos, first_row, first_part = {}, 0, 0
        with room(self.folder):
            for number, (layer, info) in enumerate(self.layers.items()):
                marker = self.work / f"layer-{layer}.json"
                activations = sum(m["layers"][str(layer)][1] for m in self.markers)
                if not marker.is_file():
                    made = index_layer(self.folder, info, number, first_row, first_part, memory)
                    write_whole(marker, json.dumps({"parts": [asdict(part) for part in made]}))
                made = [Part(**part) for part in json.loads(marker.read_text(encoding="utf-8"))["parts"]]
                parts += made
                first_row += activations
                first_part += sum(part.table == "features" for part in made)
                infos[layer] = replace(
                    info,
                    tokens=sum(m["layers"][str(layer)][0] for m in self.markers),
                    activations=activations,
                    median_norm=(medians or {}).get(layer),
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
            )
            write_whole(self.folder / MANIFEST, manifest.to_json())
        self.finished = True
        self.close()
        shutil.rmtree(self.work)


def activation_tables(layers: Mapping[int, LayerRows]) -> Iterator[pa.Table]:
    """The rows of every layer, layers in order."""
    for layer, rows in sorted(layers.items()):
        columns = [np.full(len(rows.value), layer, np.int32), rows.document, rows.position, rows.feature, rows.value]
        yield pa.Table.from_arrays([pa.array(c) for c in columns], schema=TABLES["activations"])


def write_part(folder: Path, table: str, number: int, pieces: Iterator[pa.Table] | Sequence[pa.Table]) -> Part:
    """Write one part, to the disk itself; no row group holds rows of two pieces."""
    name = part_name(table, number)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    rows = 0
    try:
        with part_writer(str(path), table) as writer:
            for piece in pieces:
                rows += piece.num_rows
                if piece.num_rows:
                    writer.write_table(piece, row_group_size=TOKEN_GROUP if table == "tokens" else ROW_GROUP)
        if not rows:
            path.unlink()
            return Part(name, 0, 0, "")
        with path.open("rb") as file:
            os.fsync(file.fileno())
            return Part(name, rows, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, even if the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY) if os.name == "posix" else None
    if directory is not None:
        os.fsync(directory)
        os.close(directory)


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """Turn a full disk into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL or "No space left" in str(error):
            raise InputError(
                f"no room to write to {folder}: the disk is full or a limit is reached; everything up to here is kept,"
                " so make room and run the same command again"
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError):
            raise InputError(f"{folder} can't be written: {error.strerror}") from error
        raise


def _same(old: Any, new: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with another request than the folder was begun with."""

    def flat(data: Any) -> dict[str, Any]:
        return {**data, **data["request"], "request": None}

    before, now = flat(old), flat(new)
    differ = [key for key in sorted(set(before) | set(now)) if before.get(key) != now.get(key)]
    if differ:
        said = "; ".join(f"{key} was {before.get(key)!r:.120}, now {now.get(key)!r:.120}" for key in differ)
        raise InputError(f"{folder} was begun with other options ({said}); repeat them or name a new folder")

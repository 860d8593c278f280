"""The parts of a store on disk: checked before they are believed, and read by row number."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from qwen_scope.errors import FormatError, NotFoundError
from qwen_scope.files import Remote

from .layout import ROW_GROUP, TABLES, Manifest, Part


@dataclass(frozen=True, eq=False)
class PartFile:
    """A part that has been checked: its path and what its end says."""

    path: Path | Remote
    metadata: pq.FileMetaData


class TableRows:
    """One table over all its parts, addressed by row number.

    Attributes:
        files: the paths of the parts.
        rows: how many rows.
        starts: the number of the first row of each row group, and at the end `rows`.
    """

    def __init__(self, name: str, parts: Sequence[PartFile]) -> None:
        self.name, self._parts = name, list(parts)
        self.files = [part.path for part in self._parts]
        self._groups = [(i, g) for i, part in enumerate(self._parts) for g in range(part.metadata.num_row_groups)]
        counts = [self._parts[i].metadata.row_group(g).num_rows for i, g in self._groups]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        self.rows = int(self.starts[-1])
        self._open: dict[int, pq.ParquetFile] = {}

    def close(self) -> None:
        """Close the files that reading opened."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def group(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group.

        Raises:
            FormatError: it can't be read.
        """
        i, group = self._groups[number]
        part = self._parts[i]
        try:
            if i not in self._open:
                if len(self._open) >= 64:
                    self.close()
                self._open[i] = pq.ParquetFile(readable(part.path), metadata=part.metadata)
            return self._open[i].read_row_group(
                group, columns=None if columns is None else list(columns), use_threads=False
            )
        except (pa.ArrowException, OSError) as error:
            raise FormatError(f"{part.path} is damaged: {' '.join(str(error).split())[:200]}") from error

    def check(self, start: int, rows: int) -> None:
        """Raise FormatError unless there are `rows` rows from `start` on."""
        if not 0 <= start <= start + rows <= self.rows:
            raise FormatError(f"the table {self.name!r} has {self.rows} rows, not rows {start} to {start + rows}")

    def read(self, start: int, rows: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows `start` to `start + rows`.

        Raises:
            FormatError: there are no such rows.
        """
        self.check(start, rows)
        pieces = [TABLES[self.name].empty_table().select(columns or TABLES[self.name].names)]
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        number, end = first, start + rows
        while rows and self.starts[number] < end:
            offset = max(0, start - int(self.starts[number]))
            length = min(end, int(self.starts[number + 1])) - int(self.starts[number]) - offset
            piece = self.group(number, columns).slice(offset, length)
            pieces.append(piece.cast(pieces[0].schema))
            number += 1
        return pa.concat_tables(pieces).combine_chunks()

    def take(self, numbers: Int64[np.ndarray, " n"], columns: Sequence[str]) -> pa.Table:
        """The rows of these numbers, in the order given; each row group is read once.

        Raises:
            FormatError: there is no such row.
        """
        if len(numbers):
            self.check(int(numbers.min()), int(numbers.max() - numbers.min()) + 1)
        groups = np.searchsorted(self.starts, numbers, side="right") - 1
        order = np.argsort(groups, kind="stable")
        pieces = [TABLES[self.name].empty_table().select(columns)]
        for group in np.unique(groups):
            here = numbers[order][groups[order] == group] - self.starts[group]
            pieces.append(self.group(int(group), columns).take(pa.array(here)).cast(pieces[0].schema))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return pa.concat_tables(pieces).combine_chunks().take(pa.array(back))

    def between(self, low: int, high: int, layer: int | None = None) -> pa.Table:
        """The rows of documents `low` to `high`, the last one not included, of a table with a column `document`.

        Args:
            layer: only of this layer.
        """
        near = (self._bound("document", "min") < high) & (self._bound("document", "max") >= low)
        if layer is not None:
            near &= (self._bound("layer", "min") <= layer) & (self._bound("layer", "max") >= layer)
        pieces = [TABLES[self.name].empty_table()]
        for number in np.flatnonzero(near).tolist():
            piece = self.group(number)
            document = piece["document"].to_numpy()
            keep = (document >= low) & (document < high)
            if layer is not None:
                keep &= piece["layer"].to_numpy() == layer
            pieces.append((piece if keep.all() else piece.filter(pa.array(keep))).cast(pieces[0].schema))
        return pa.concat_tables(pieces)

    def groups_of(self, layer: int, document: int) -> list[int]:
        """Row groups of `activations` or `masked` that may hold rows of a document at a layer."""
        return np.flatnonzero(
            (self._bound("layer", "min") <= layer)
            & (self._bound("layer", "max") >= layer)
            & (self._bound("document", "min") <= document)
            & (self._bound("document", "max") >= document)
        ).tolist()

    def _bound(self, column: str, side: str) -> np.ndarray:
        name = f"_{column}_{side}"
        if not hasattr(self, name):
            at = TABLES[self.name].get_field_index(column)
            groups = (self._parts[i].metadata.row_group(g).column(at).statistics for i, g in self._groups)
            setattr(self, name, np.array([getattr(s, side) for s in groups], np.int64))
        return getattr(self, name)


def check_parts(folder: Path | Remote, manifest: Manifest) -> dict[str, list[PartFile]]:
    """The parts of every table, each as the manifest and the format say it must be.

    Raises:
        NotFoundError: a part is missing.   FormatError: a part is not what it must be.
    """
    found: dict[str, list[PartFile]] = {name: [] for name in TABLES}
    for part in manifest.parts:
        path = folder / part.file
        metadata = _footer(path, part)
        schema = metadata.schema.to_arrow_schema()
        wanted = TABLES[part.table]
        if schema.names != wanted.names or any(not _alike(schema.field(f.name).type, f.type) for f in wanted):
            raise FormatError(f"{path} has not the columns of the table {part.table!r}")
        if metadata.num_rows != part.rows:
            raise FormatError(f"{path} has {metadata.num_rows} rows and the manifest says {part.rows}")
        _check_ranges(path, part.table, metadata, manifest)
        found[part.table].append(PartFile(path, metadata))
    return found


def check_rows(tables: Mapping[str, TableRows], manifest: Manifest, folder: Path | Remote) -> None:
    """Raise FormatError where a table has another number of rows than the manifest says."""
    activations = sum(info.activations for info in manifest.layers.values())
    wanted = {"documents": manifest.documents, "tokens": manifest.tokens}
    wanted |= {"activations": activations, "features": activations}
    wanted["stats"] = sum(info.d_sae for info in manifest.layers.values())
    for name, rows in wanted.items():
        if tables[name].rows != rows:
            raise FormatError(f"{folder} has {tables[name].rows} rows of {name!r} and its manifest says {rows}")


def readable(path: Path | Remote) -> Any:
    """What pyarrow reads a part from; at a URI it asks for the few ranges that it needs."""
    return path if isinstance(path, Path) else path.open("rb")


def _footer(path: Path | Remote, part: Part) -> pq.FileMetaData:
    """What the end of a part says, if the file is the manifest's."""
    if isinstance(path, Path):
        try:
            links = [os.lstat(path.parent).st_mode, os.lstat(path).st_mode]
        except OSError as error:
            raise NotFoundError(f"the store lacks its part {path}") from error
        if not stat.S_ISDIR(links[0]) or not stat.S_ISREG(links[1]):
            raise FormatError(f"{path} is a link or no plain file; a store holds its own parts")
    elif not path.is_file():
        raise NotFoundError(f"the store lacks its part {path}")
    size = path.stat().st_size
    if size != part.bytes:
        raise FormatError(f"{path} has {size} bytes and the manifest says {part.bytes}: it was cut off or changed")
    try:
        return pq.read_metadata(readable(path))
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{path} is not a whole Parquet file: {' '.join(str(error).split())[:200]}") from error


def _alike(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_list(wanted):
        return pa.types.is_list(found) and found.value_type == wanted.value_type
    return found == wanted


def _check_ranges(path: Path | Remote, table: str, metadata: pq.FileMetaData, manifest: Manifest) -> None:
    """Every row group within bounds, by the minimum and maximum that Parquet keeps of it."""
    names = TABLES[table].names
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if group.num_rows > ROW_GROUP:
            raise FormatError(f"{path} has a row group of {group.num_rows} rows; at most {ROW_GROUP} fit this format")
        bounds = {}
        for at, name in enumerate(names[: group.num_columns]):
            if name in ("layer", "document", "position", "feature", "value"):
                statistics = group.column(at).statistics
                if statistics is None or not statistics.has_min_max:
                    raise FormatError(f"{path} lacks the minimum and maximum of {name!r}")
                bounds[name] = (statistics.min, statistics.max)
        limits = {"document": manifest.documents, "position": 2**31}
        if "layer" in bounds:
            layer, top = bounds["layer"]
            if not {layer, top} <= set(manifest.layers) or (
                layer != top and table in ("activations", "features", "stats")
            ):
                raise FormatError(f"{path} holds layers {layer} to {top}, which the manifest does not have")
            limits["feature"] = manifest.layers[layer].d_sae
        for name, end in limits.items():
            low, high = bounds.get(name, (0, -1))  # a table without the column, such as the stats of no document
            if low < 0 or high >= end:
                raise FormatError(f"{path} holds a {name} of {low if low < 0 else high}; it must be in [0, {end})")
        low, high = bounds.get("value", (1.0, 1.0))
        if not (low > 0 and np.isfinite(high)):
            raise FormatError(
                f"{path} holds a value of {low if not low > 0 else high}; activations are finite and above 0"
            )

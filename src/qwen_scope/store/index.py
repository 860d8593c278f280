"""The second sort order and the statistics, in one stream per layer each: memory does not grow with the corpus."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen_scope.errors import InputError
from qwen_scope.files import Remote, temporary_folder

from .layout import PART_ROWS, ROW_GROUP, TABLES, WORK, LayerInfo, Part, in_utf8
from .part_file import write_part
from .queries import named

FEATURE_BYTES, SPILL_BYTES = 6, 27
"""What an activation takes on the disk in `features`, and while it is sorted, in bytes; both a little more than
`bench/store.py` has measured."""

IN_MEMORY, AT_ONCE = 2**25, 2**27
"""So many activations are sorted in memory, and so many at once: a sort of a billion takes twice the disk for each that
one of a tenth does, so a larger layer is sorted in ranges of features."""


def check_disk(folder: Path | Remote, activations: Sequence[int]) -> None:
    """Refuse an index for which the disk has no room, before the work.

    For a store at a URI that is the disk of temporary files, which holds the layer that is sorted and one part.

    Args:
        activations: of each layer that is still to be sorted.

    Raises:
        InputError: it says what the index takes and what is free.
    """
    largest = max(activations, default=0)
    here = Path(tempfile.gettempdir()) if isinstance(folder, Remote) else folder
    kept = min(largest, PART_ROWS) if isinstance(folder, Remote) else sum(activations)
    needed = FEATURE_BYTES * kept + spilled(largest)
    free = shutil.disk_usage(here).free
    if needed > free:
        raise InputError(
            f"the index of {sum(activations):,} activations takes about {needed / 1e9:.1f} GB in {here} and"
            f" {free / 1e9:.1f} GB are free; make room and run the same command again, what is extracted is kept"
        )


def spilled(activations: int) -> int:
    """Bytes that the sort of a layer takes on the disk beside what it writes, unless one feature has most of it."""
    return SPILL_BYTES * min(activations, AT_ONCE) if activations >= IN_MEMORY else 0


def index_layer(
    folder: Path | Remote, info: LayerInfo, number: int, first_row: int, first_part: int, memory: str
) -> list[Part]:
    """Write the `features` and `stats` parts of one layer.

    Args:
        number: of the `stats` part.   first_row, first_part: rows and parts of `features` before this layer.
        memory: how much the sort may take before it goes to disk.
    """
    files = sorted((folder / "activations").glob("*.parquet"))
    stats, parts = layer_stats(files, info, first_row), list[Part]()
    ranges = in_ranges(stats["tokens"].to_numpy())
    with spill_of(folder) as spill:
        for pieces in in_parts(sorted_rows(files, info.layer, ranges, spill, memory) if files else iter(())):
            parts.append(write_part(folder, "features", first_part + len(parts), pieces))
    parts = [part for part in parts if part.rows]
    return [*parts, write_part(folder, "stats", number, [stats])]


def in_ranges(tokens: np.ndarray) -> list[tuple[int, int]]:
    """First and last feature of each range that is sorted at once, from how many tokens each of them fires on.

    A range holds at most `AT_ONCE` activations, or one feature. The last one reaches beyond every feature.
    """
    firsts, held = [0], 0
    for feature, n in enumerate(tokens.tolist()):
        if held and held + n > AT_ONCE:
            firsts.append(feature)
            held = 0
        held += n
    return list(zip(firsts, [first - 1 for first in firsts[1:]] + [2**31 - 1], strict=True))


@contextmanager
def spill_of(folder: Path | Remote) -> Iterator[Path]:
    """Where a sort goes that is larger than its memory: beside the store, or for one at a URI among temporary files."""
    if isinstance(folder, Remote):
        with temporary_folder() as place:
            yield place
        return
    yield folder / WORK / "spill"
    shutil.rmtree(folder / WORK / "spill", ignore_errors=True)


def sorted_rows(
    files: Sequence[Path | Remote], layer: int, ranges: Sequence[tuple[int, int]], spill: Path, memory: str
) -> Iterator[pa.Table]:
    """The rows of a layer by feature, then falling value, then document and position; whole row groups but the last.

    Args:
        ranges: of features, ascending; every file is read once for each.
    """
    with duckdb.connect(config={"memory_limit": memory, "temp_directory": in_utf8(spill)}) as connection:
        if isinstance(files[0], Remote):
            connection.register_filesystem(files[0].filesystem)
        held: list[pa.Table] = []
        for first, last in ranges:
            rows = connection.sql(
                "SELECT layer, document, position, feature, value FROM read_parquet($files)"
                " WHERE layer = $layer AND feature BETWEEN $first AND $last"
                " ORDER BY feature, value DESC, document, position",
                params={"files": [named(file) for file in files], "layer": layer, "first": first, "last": last},
            )
            try:
                for batch in rows.to_arrow_reader(ROW_GROUP):
                    held.append(pa.Table.from_batches([batch]).cast(TABLES["features"]))
                    while sum(map(len, held)) >= ROW_GROUP:
                        whole = pa.concat_tables(held)
                        yield whole.slice(0, ROW_GROUP)
                        held = [whole.slice(ROW_GROUP)]
            except (duckdb.IOException, duckdb.OutOfMemoryException, pa.ArrowException) as error:
                said = " ".join(str(error).split())
                raise InputError(
                    f"the activations of layer {layer} could not be sorted ({said:.200}); make room on the disk and"
                    " run the same command again, nothing is lost"
                ) from error
        if rest := [table for table in held if len(table)]:
            yield pa.concat_tables(rest)


def in_parts(tables: Iterator[pa.Table]) -> Iterator[Iterator[pa.Table]]:
    """The tables in groups of `PART_ROWS` rows; each group is to be read before the next is asked for."""
    for first in tables:

        def part(table: pa.Table | None = first) -> Iterator[pa.Table]:
            rows = 0
            while table is not None:
                yield table
                rows += len(table)
                table = next(tables, None) if rows < PART_ROWS else None

        yield part()


def layer_stats(files: Sequence[Path | Remote], info: LayerInfo, first_row: int) -> pa.Table:
    """One row per feature, from one pass over the activations in document order."""
    tokens, documents = np.zeros(info.d_sae, np.int64), np.zeros(info.d_sae, np.int64)
    total = np.zeros(info.d_sae, np.float64)
    maximum, minimum = np.zeros(info.d_sae, np.float32), np.full(info.d_sae, np.inf, np.float32)
    last_document = np.full(info.d_sae, -1, np.int64)
    for document, feature, value in layer_batches(files, info.layer):
        tokens += np.bincount(feature, minlength=info.d_sae)
        np.add.at(total, feature, value.astype(np.float64))
        np.maximum.at(maximum, feature, value)
        np.minimum.at(minimum, feature, value)
        # One key per pair of document and feature. Only the first document can have begun in an earlier batch.
        pairs = np.unique((document - document[0]).astype(np.int64) * info.d_sae + feature)
        in_document, features = pairs // info.d_sae + document[0], pairs % info.d_sae
        new = last_document[features] != in_document
        documents += np.bincount(features[new], minlength=info.d_sae)
        np.maximum.at(last_document, features, in_document)
    first = first_row + np.concatenate([[0], np.cumsum(tokens)[:-1]])
    minimum[tokens == 0] = 0
    names = np.arange(info.d_sae, dtype=np.int32)
    columns = [np.full(info.d_sae, info.layer, np.int32), names, tokens, documents, total, maximum, minimum, first]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=TABLES["stats"])


def layer_batches(files: Sequence[Path | Remote], layer: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Document, feature and value of a layer's activations, a row group at a time, in document order."""
    for path in files:
        with pq.ParquetFile(path.open("rb") if isinstance(path, Remote) else named(path)) as file:
            for group in range(file.num_row_groups):
                if file.metadata.row_group(group).column(0).statistics.min == layer:
                    table = file.read_row_group(group, columns=["document", "feature", "value"])
                    yield tuple(table[column].to_numpy() for column in ("document", "feature", "value"))  # pyright: ignore[reportReturnType]

"""Rows of text files, JSONL, CSV, Parquet and datasets, from any place on, parsed only when they are wanted."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from qwen_scope.errors import FormatError, foreign
from qwen_scope.files import Remote

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
Begin = Literal["anywhere", "first", "stream"]
DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)


@dataclass(frozen=True)
class Problem:
    """Why a row could not be used: the reason it is counted under, and its content."""

    reason: str
    detail: str


@dataclass(frozen=True, eq=False)
class Raw:
    """A row that is not parsed yet.

    Attributes:
        row: its number in the source, counted from 1; for JSONL and lines the number of the line.
        offset: where the next row begins: bytes for text, rows for tables.
        parse: the text or the columns of the row, or why there are none.
    """

    row: int
    offset: int
    parse: Callable[[], Any]


@dataclass(frozen=True)
class Source:
    """One file, dataset or list.

    Attributes:
        name: what documents say they come from.
        size: in the unit of the offsets, or None where it is not known.
        read: its rows from a place on: the number of rows before it, and the offset.
        rows: how many it has, where that is known without reading; their offsets are their numbers then.
        begin: where reading can begin without reading what stands before: `anywhere`, or at its `first` row alone; of a
            `stream` the rows can't be counted either.
    """

    name: str
    size: int | None
    read: Callable[[int, int], Iterator[Raw]]
    rows: int | None = None
    begin: Begin = "anywhere"


def is_readable(path: Path | Remote) -> bool:
    """Whether the name is that of a kind of file a corpus can be read from."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix in SUFFIXES


def file_source(path: Path | Remote, name: str, unit: str) -> Source:
    """The source in a file, by its suffix.

    Raises:
        FormatError: it is no Parquet file.
    """
    zipped = path.suffix == ".gz"
    suffix = (path.with_suffix("") if zipped else path).suffix
    size = None if zipped else path.stat().st_size
    begin: Begin = "first" if zipped else "anywhere"
    if suffix == ".parquet":
        try:
            with parquet(path) as file:
                rows = file.metadata.num_rows
                return Source(name, rows, partial(parquet_rows, path), rows, begin)
        except (pa.ArrowException, OSError, *DAMAGED) as error:
            raise FormatError(f"{path} is not a Parquet file: {' '.join(str(error).split())[:200]}") from error
    if suffix in (".csv", ".tsv"):
        return Source(name, size, partial(csv_rows, path, "\t" if suffix == ".tsv" else ","), begin=begin)
    if suffix in (".jsonl", ".ndjson"):
        return Source(name, size, partial(line_rows, path, parse_json), begin=begin)
    if unit == "line":
        return Source(name, size, partial(line_rows, path, decode), begin=begin)
    return Source(name, size, partial(block_rows, path, unit), begin=begin)


class Unzipped(gzip.GzipFile):
    """A gzipped file that closes the file below it as well."""

    def __init__(self, data: Any) -> None:
        super().__init__(fileobj=data, mode="rb")
        self._below = data

    def close(self) -> None:
        super().close()
        self._below.close()


def opened(path: Path | Remote, offset: int) -> Any:
    """The bytes of a file, unzipped, from an offset on."""
    file: Any = path.open("rb")  # the caller closes
    if path.suffix == ".gz":
        file = Unzipped(file)
    if offset:
        with foreign(f"{path} can't be read up to where the work was stopped"):
            file.seek(offset)
        return file
    with suppress(*DAMAGED):  # whoever reads the first line meets it again
        if file.read(3) == b"\xef\xbb\xbf":  # a byte order mark is no text
            return file
    file.seek(0)
    return file


def line_rows(path: Path | Remote, parse: Callable[[bytes], Any], rows: int, offset: int) -> Iterator[Raw]:
    """The lines of a file that are not blank; `rows` counts the blank ones too."""
    with opened(path, offset) as file:
        while True:
            line = next_line(file)
            if isinstance(line, Problem):
                yield Raw(rows + 1, file.tell(), partial(same, line))
                return
            if not line:
                return
            rows += 1
            if line.strip():
                yield Raw(rows, file.tell(), partial(parse, line))


def block_rows(path: Path | Remote, unit: str, rows: int, offset: int) -> Iterator[Raw]:
    """The texts between blank lines, or the whole file."""
    with opened(path, offset) as file:
        held: list[bytes] = []
        while True:
            line = next_line(file)
            if isinstance(line, Problem):
                yield Raw(rows + 1, file.tell(), partial(same, line))
                return
            if line and (line.strip() or unit == "file"):
                held.append(line)
                continue
            if held:
                rows += 1
                yield Raw(rows, file.tell(), partial(decode, b"".join(held)))
                held = []
            if not line:
                return


def csv_rows(path: Path | Remote, delimiter: str, rows: int, offset: int) -> Iterator[Raw]:
    """The records of a CSV file after its header."""
    csv.field_size_limit(2**31 - 1)
    # Bytes that are no UTF-8 become lone surrogates, which the row's reader finds.
    with opened(path, 0) as file:
        lines = (line.decode("utf-8", "surrogateescape") for line in iter(file.readline, b""))
        records = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            header = next(records, [])
        except (csv.Error, *DAMAGED) as error:
            yield Raw(1, file.tell(), partial(same, Problem("bad CSV", f"the header: {error}")))
            return
        if offset:
            file.seek(offset)
        while True:
            try:
                record: Any = next(records, None)
            except csv.Error as error:
                record = Problem("bad CSV", str(error))
            except DAMAGED as error:
                yield Raw(rows + 1, file.tell(), partial(same, Problem("damaged file", str(error))))
                return
            if record is None:
                return
            if record:
                rows += 1
                yield Raw(rows, file.tell(), partial(parse_record, header, record))


@contextmanager
def parquet(path: Path | Remote) -> Iterator[pq.ParquetFile]:
    """An open Parquet file; a gzipped one is unpacked beside memory, since its end has to be read first."""
    if path.suffix != ".gz":
        with path.open("rb") as data, pq.ParquetFile(data) as file:
            yield file
        return
    with tempfile.TemporaryFile() as whole, path.open("rb") as data, gzip.open(data, "rb") as zipped:
        shutil.copyfileobj(zipped, whole)
        with pq.ParquetFile(whole) as file:
            yield file


def parquet_rows(path: Path | Remote, rows: int, offset: int) -> Iterator[Raw]:
    """The rows of a Parquet file; a row group that can't be read is one row that can't."""
    with parquet(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            if end > rows:
                at = first
                try:
                    for batch in file.iter_batches(batch_size=256, row_groups=[group], use_threads=False):
                        if at + len(batch) > rows:
                            for i in range(max(0, rows - at), len(batch)):
                                yield Raw(at + i + 1, at + i + 1, partial(record_of, batch, i))
                        at += len(batch)
                except (pa.ArrowException, OSError) as error:
                    problem = Problem("damaged file", f"rows {at + 1} to {end}: {' '.join(str(error).split())[:200]}")
                    yield Raw(at + 1, end, partial(same, problem))
            first = end


def next_line(file: Any) -> bytes | Problem:
    """The next line with its end, nothing at the end of the file, or why it can't be read."""
    try:
        return file.readline()
    except DAMAGED as error:
        return Problem("damaged file", str(error))


def same(value: Any) -> Any:
    """What is there already."""
    return value


def decode(data: bytes) -> str | Problem:
    """Text from bytes, without the line's end."""
    try:
        return data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return Problem("invalid UTF-8", f"byte {error.start}: {data[error.start : error.start + 4]!r}")


def parse_json(line: bytes) -> Any:
    """A line of JSONL."""
    text = decode(line)
    if isinstance(text, Problem):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Problem("bad JSON", str(error))


def parse_record(header: list[str], record: list[str] | Problem) -> Mapping[str, str] | Problem:
    """A record of CSV as its columns."""
    if isinstance(record, Problem):
        return record
    if len(record) != len(header):
        return Problem("bad CSV", f"{len(record)} fields under a header of {len(header)}")
    if not all(field.isascii() for field in record):
        for name, field in zip(header, record, strict=True):
            try:
                field.encode()
            except UnicodeEncodeError:
                return Problem("invalid UTF-8", f"in the column {name!r}")
    return dict(zip(header, record, strict=True))


def record_of(batch: pa.RecordBatch, i: int) -> Any:
    """One row of a batch as its columns."""
    try:
        return batch.slice(i, 1).to_pylist()[0]
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        return Problem("invalid UTF-8" if isinstance(error, UnicodeDecodeError) else "bad value", str(error))

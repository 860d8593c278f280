"""What a name or an object stands for: files, datasets, tables, lists, the lab."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from qwen_scope.errors import InputError, NotFoundError, foreign, need
from qwen_scope.files import Remote, place

from .lab import is_lab, lab_source
from .read import SUFFIXES, Raw, Source, file_source, is_readable, record_of, same

OTHERS = (".json", ".gz", ".zst", ".md", ".arrow")  # of files that are not read, which are no names of datasets
# Files that a store of features has, each in a folder of its table.
_PARTS = {name: re.compile(rf"(.*/|){name}/[0-9]{{6,}}\.parquet") for name in ("activations", "documents")}
BATCH = 256  # rows of a table that are turned into Python objects together


@dataclass(frozen=True)
class Together:
    """Several named sources that are read as one corpus, in this order.

    Raises:
        InputError: no name, or one twice.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise InputError(f"name each source of documents once, and at least one; got {list(self.names)}")


def find_sources(
    source: Any,
    *,
    unit: str,
    split: str = "train",
    subset: str | None = None,
    seed: int = 0,
    n: int | None = None,
    name: str | None = None,
) -> tuple[list[Source], str]:
    """The sources that a name or an object stands for, and what to call them together.

    Args:
        seed, n: of the lab, whose documents are drawn: which ones and how many; without end for None.

    Raises:
        NotFoundError: there is no such file, dataset, split or package.
        InputError: an object that holds no documents, a folder without a file of a known kind, or a store.
        FormatError: a `.parquet` file is none.
    """
    if isinstance(source, Together):
        each = [find_sources(one, unit=unit, split=split, subset=subset, seed=seed, n=n) for one in source.names]
        return [found for some, _ in each for found in some], ", ".join(called for _, called in each)
    if isinstance(source, str | os.PathLike):
        if is_lab(source):
            found = lab_source(str(os.fspath(source)), split, seed, n)
            return [found], found.name
        return named(os.fspath(source), unit, split, subset)
    found = object_source(source, split, name)
    return [found], found.name


def named(source: str, unit: str, split: str, subset: str | None) -> tuple[list[Source], str]:
    """The sources behind a name: a file, the files of a folder, a dataset on disk or on the Hub."""
    path = place(source).expanduser()
    if path.is_file():
        if not is_readable(path):
            raise InputError(f"{path} is no corpus this package reads; it reads {', '.join(SUFFIXES)}, also with .gz")
        return [file_source(path, path.name, unit)], path.name
    if path.is_dir():
        named = (path / name for name in ("dataset_info.json", "dataset_dict.json"))
        if isinstance(path, Path) and any(file.is_file() for file in named):
            with foreign(f"{path} can't be read as a dataset"):
                dataset = datasets_package().load_from_disk(str(path))
            found = object_source(dataset, split, path.name)
            return [found], path.name
        below = [p for p in path.rglob("*") if isinstance(p, Remote) or p.is_file()]
        files = sorted(p for p in below if is_readable(p))  # pyright: ignore[reportArgumentType]  # all of one kind
        names = [p.relative_to(path).as_posix() for p in files]  # pyright: ignore[reportArgumentType]
        if "" in (stores := stores_in(names)):
            raise InputError(f"{path} is a store of features; name the documents it was made of")
        found = [(p, name) for p, name in zip(files, names, strict=True) if not name.startswith(stores)]
        if not found:
            raise InputError(f"{path} holds no file that ends with {', '.join(SUFFIXES)}")
        return [file_source(p, name, unit) for p, name in found], path.name
    file_like = is_readable(path) or path.suffix in OTHERS
    if (
        isinstance(path, Remote)
        or path.is_absolute()
        or source.count("/") != 1
        or source.startswith((".", "~"))
        or file_like
    ):
        raise NotFoundError(f"there is no file, folder or dataset {source!r}")
    datasets = datasets_package(f"{source!r} is no file here, and reading it from the Hub")
    with foreign(f"there is no file {source!r} here, and the Hub does not give it as a dataset", NotFoundError):
        stream = datasets.load_dataset(source, subset, split=split, streaming=True)
    return [Source(f"hub:{source}", None, partial(dataset_rows, stream), begin="stream")], source


def stores_in(names: Sequence[str]) -> tuple[str, ...]:
    """Where in a folder stores lie, as beginnings of the names of its files: a store holds token texts in Parquet, too,
    which would read as documents of one token each."""
    parts = {table: {m[1] for m in map(part.fullmatch, names) if m} for table, part in _PARTS.items()}
    return tuple(sorted(set.intersection(*parts.values())))


def object_source(source: Any, split: str, name: str | None) -> Source:
    """The source in a Python object. Tables are read by row, never by iterating over the names of their columns.

    Raises:
        NotFoundError: a dictionary of splits without the split.   InputError: an object that holds no documents.
    """
    kind = type(source).__name__
    if kind in ("DatasetDict", "IterableDatasetDict"):
        if split not in source:
            raise NotFoundError(f"there is no split {split!r} in this {kind}; it has {', '.join(map(repr, source))}")
        return object_source(source[split], split, name)
    package = type(source).__module__.partition(".")[0]
    size = len(source) if hasattr(source, "__len__") else None
    if package == "datasets":
        return in_memory(name or "dataset", size, partial(dataset_rows, source))
    if isinstance(source, pa.Table | pa.RecordBatch | pa.ChunkedArray | pa.Array):
        read = table_rows if isinstance(source, pa.Table | pa.RecordBatch) else array_rows
        return in_memory(name or "table", size, partial(read, source))
    if package in ("pandas", "polars") and hasattr(source, "columns"):
        return in_memory(name or "table", size, partial(frame_rows, source))
    if isinstance(source, Mapping):
        return in_memory(name or "table", *columns_source(source))
    if isinstance(source, Iterable) and not isinstance(source, str | bytes | bytearray | set | frozenset):
        return in_memory(name or "list", size, partial(item_rows, source))
    raise InputError(
        f"a {kind} holds no documents in an order; pass a file, a list of texts, a dataset, or a table with a column of"
        " texts"
    )


def in_memory(name: str, size: int | None, read: Callable[[int, int], Iterator[Raw]]) -> Source:
    """The source in an object whose rows are numbered; without a length it is a stream."""
    return Source(name, size, read, size, "stream" if size is None else "anywhere")


def columns_source(columns: Mapping[Any, Any]) -> tuple[int, Any]:
    """How many rows a mapping of columns has, and how they are read.

    Raises:
        InputError: a value that is no column, or columns of unequal length.
    """
    for name, column in columns.items():
        if isinstance(column, str | bytes | Mapping) or not hasattr(column, "__len__"):
            raise InputError(
                f"{name!r} holds {type(column).__name__}, where a mapping has a column: a list with one value per row;"
                " a single row goes into a list"
            )
    lengths = {str(name): len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
        said = ", ".join(f"{name!r} has {length}" for name, length in lengths.items()) or "there is none"
        raise InputError(f"the columns of a mapping have one length: {said}")

    def rows(before: int, offset: int) -> Iterator[Raw]:
        for i in range(before, next(iter(lengths.values()))):
            yield Raw(i + 1, i + 1, partial(same, {name: column[i] for name, column in columns.items()}))

    return next(iter(lengths.values())), rows


def dataset_rows(dataset: Any, rows: int, offset: int) -> Iterator[Raw]:
    """The rows of a Hugging Face dataset, streamed or not."""
    with foreign("the dataset can't be read on"):
        for number, row in enumerate(dataset.skip(rows), rows + 1):
            yield Raw(number, number, partial(same, row))


def table_rows(table: pa.Table | pa.RecordBatch, rows: int, offset: int) -> Iterator[Raw]:
    """The rows of an Arrow table."""
    rest = table.slice(rows)
    batches = rest.to_batches(max_chunksize=BATCH) if isinstance(rest, pa.Table) else [rest]
    number = rows
    for batch in batches:
        for i in range(len(batch)):
            number += 1
            yield Raw(number, number, partial(record_of, batch, i))


def array_rows(array: pa.Array | pa.ChunkedArray, rows: int, offset: int) -> Iterator[Raw]:
    """The values of an Arrow column."""
    for i in range(rows, len(array)):
        yield Raw(i + 1, i + 1, array[i].as_py)


def frame_rows(frame: Any, rows: int, offset: int) -> Iterator[Raw]:
    """The rows of a frame of pandas or polars."""
    names = [str(name) for name in frame.columns]
    if hasattr(frame, "iter_rows"):
        found = frame.slice(rows).iter_rows()
    else:
        found = frame.iloc[rows:].itertuples(index=False, name=None)
    for number, values in enumerate(found, rows + 1):
        yield Raw(number, number, partial(same, dict(zip(names, values, strict=True))))


def item_rows(items: Iterable[Any] | Sequence[Any], rows: int, offset: int) -> Iterator[Raw]:
    """The items of a list or of anything that gives them one after the other: texts, or mappings of columns."""
    for number, item in enumerate(islice(items, rows, None), rows + 1):
        yield Raw(number, number, partial(same, item))


def datasets_package(what: str = "reading a dataset") -> Any:
    """The package `datasets`."""
    need(what, "datasets")
    import datasets

    return datasets

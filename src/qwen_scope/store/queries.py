"""DuckDB over the tables of a store, shut in: it reads that folder, writes nothing, and answers one SELECT each."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from qwen_scope.errors import InputError, reason
from qwen_scope.files import Remote

from .layout import TABLES, in_utf8
from .parts import TableRows

LONGEST = 100_000  # characters of a query
SECONDS, MEGABYTES = 600.0, 100  # of the answer to somebody else's query
SPILL = "20GB"  # what DuckDB may put on disk for a query larger than its memory


def connect(folder: Path | Remote, tables: Mapping[str, TableRows], memory: str) -> duckdb.DuckDBPyConnection:
    """A connection with one view per table; nothing is copied into it.

    The views read files, so file access can't be switched off; it is confined to the folder, links out of it excluded,
    extensions are neither installed nor loaded, and then the configuration is locked. A store at a URI is read through
    its fsspec file system, and no other file of it.
    """
    config: dict[str, Any] = {
        "memory_limit": memory,
        "max_temp_directory_size": SPILL,
        "autoinstall_known_extensions": False,
        "python_enable_replacements": False,
        "parquet_metadata_cache": True,
    }
    connection = duckdb.connect(config=config)
    if isinstance(folder, Remote):
        connection.register_filesystem(folder.filesystem)
    for name, table in tables.items():
        if table.files:
            connection.read_parquet([named(path) for path in table.files]).to_view(name)
        else:
            connection.from_arrow(TABLES[name].empty_table()).to_view(name)
    place = named(folder).replace("'", "''")
    for setting in (
        "autoload_known_extensions = false", "allow_community_extensions = false", f"allowed_directories = ['{place}']",
        "enable_external_access = false", "lock_configuration = true",
    ):  # fmt: skip
        connection.execute(f"SET {setting}")
    return connection


def named(path: Path | Remote) -> str:
    """A path as DuckDB takes it."""
    return path.whole if isinstance(path, Remote) else in_utf8(path)


def select(
    connection: duckdb.DuckDBPyConnection,
    query: str,
    params: Mapping[str, Any] | Sequence[Any] | None = None,
    batch: int = 2**16,
) -> pa.RecordBatchReader:
    """The answer to a single SELECT.

    Raises:
        InputError: it is none, or DuckDB refuses it.
    """
    if len(query) > LONGEST:
        raise InputError(f"a query has at most {LONGEST:,} characters, not {len(query):,}")
    if any("\ud800" <= char <= "\udfff" for char in query):
        raise InputError("the query is not all text: some of its bytes are no UTF-8")
    with refusals():
        statements = connection.extract_statements(query)
        kinds = [str(one.type).rpartition(".")[2] for one in statements]
        if kinds != ["SELECT"]:
            found = ", ".join(kinds[:5]) or "nothing"
            raise InputError(f"a store answers one SELECT (or FROM, WITH, DESCRIBE, SUMMARIZE), not {found}")
        plain = dict(params) if isinstance(params, Mapping) else None if params is None else list(params)
        relation = connection.sql(query, params=plain)
        if relation is None:
            raise InputError(f"the query gives no rows: {query!r:.200}")
        return relation.to_arrow_reader(batch)


def read_bounded(
    connection: duckdb.DuckDBPyConnection, query: str, seconds: float = SECONDS, megabytes: int = MEGABYTES
) -> pa.Table:
    """The whole answer to a single SELECT, if it is there in time and not too large.

    Raises:
        InputError: it is not, or as `select`.
    """
    over = threading.Event()

    def stop() -> None:
        over.set()
        connection.interrupt()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        reader = select(connection, query, batch=2**11)
        batches, held = [], 0
        with refusals():
            for one in reader:
                batches.append(one)
                held += one.nbytes
                if held > megabytes * 10**6:
                    raise InputError(
                        f"the answer is larger than {megabytes} MB; ask for less with LIMIT, or read the store's"
                        " Parquet files with a tool of your own"
                    )
        return pa.Table.from_batches(batches, reader.schema)
    except InputError as error:
        if over.is_set():
            raise InputError(f"the query was stopped after {seconds:g} seconds") from error
        raise
    finally:
        timer.cancel()


@contextmanager
def refusals() -> Iterator[None]:
    """What DuckDB and Arrow say of a query as one sentence."""
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"DuckDB refuses the query: {reason(error)}") from error

"""`--out FILE`: what a command prints as tables, into a file that a data frame reads.

One mechanism for all commands: `commands.Command` gives the option to every command that prints tables or JSON and
writes nothing else by that name, `output.show` keeps what it prints, and the file is written when the command ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_scope.errors import InputError

from . import names

if TYPE_CHECKING:
    from qwen_scope.report import Table

ENDINGS = (".csv", ".parquet", ".json")
HELP = "Also write the table to a .csv, .parquet or .json file, with every figure in full."

_kept: ContextVar[list[Table] | None] = ContextVar("kept", default=None)


def keep(table: Table) -> None:
    """Keep a table for the file of a command that writes one."""
    if (held := _kept.get()) is not None:
        held.append(table)


def is_file(out: Path | None) -> bool:
    """Whether an output is a file of a table, rather than a folder."""
    return out is not None and out.suffix.lower() in ENDINGS and not out.is_dir()


@contextmanager
def kept() -> Iterator[list[Table]]:
    """The tables that are shown in the block."""
    tables: list[Table] = []
    token = _kept.set(tables)
    try:
        yield tables
    finally:
        _kept.reset(token)


def check(out: Path, *inputs: str | Path) -> None:
    """Refuse before the work a file that tables can't be written to.

    Raises:
        InputError: another ending, one of the inputs, or a file that can't be written.
    """
    from qwen_scope.files import check_output

    if out.suffix.lower() not in ENDINGS:
        raise InputError(f"--out {out}: a table is written to a file that ends with {', '.join(ENDINGS)}")
    check_output(out, *inputs)


def save(tables: Sequence[Table], out: Path) -> Iterator[str]:
    """Write tables to a file; each file that is written is told of in a sentence.

    Tables with the same columns stand below each other; of several with other columns each further one gets a file of
    its own, named after the beginning of its title.
    """
    from qwen_scope.files import write_whole
    from qwen_scope.report import file_of, joined

    found = [names.dropped(table) for table in joined(tables)]
    for table, path in zip(found, files_of(out, found), strict=True):
        with write_whole(path) as part:
            part.write_bytes(file_of(table, path.suffix.lower().removeprefix(".")))
        rows = f"{len(table.rows):,} row{'s' * (len(table.rows) != 1)}"
        yield f"{rows} written to {path}"


def files_of(out: Path, tables: Sequence[Table]) -> list[Path]:
    """A file for each table: the first one's is the one that was asked for."""
    found = [out]
    for table in tables[1:]:
        slug = re.sub(r"\W+", "-", re.split("[;:,(]", table.title.lower())[0]).strip("-")[:40].rstrip("-") or "table"
        path = out.with_name(f"{out.stem}-{slug}{out.suffix}")
        number = 2
        while path in found:
            path = out.with_name(f"{out.stem}-{slug}-{number}{out.suffix}")
            number += 1
        found.append(path)
    return found

"""One part of a store, written whole to the disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from qwen_scope.files import Remote, digest_of, temporary_folder

from .layout import ROW_GROUP, TOKEN_GROUP, Part, part_name, part_writer


def write_part(folder: Path | Remote, table: str, number: int, pieces: Iterator[pa.Table] | Sequence[pa.Table]) -> Part:
    """Write one part, to the disk itself, or at a URI as one whole object; no row group holds rows of two pieces."""
    name = part_name(table, number)
    if isinstance(folder, Remote):
        with temporary_folder() as here:
            part = write_part(here, table, number, pieces)
            if part.rows:
                (folder / name).put(here / name)
        return part
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)  # a worker that was given up may still write to the file it opened, and to no other
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
        return Part(name, rows, path.stat().st_size, digest_of(path, sync=True))
    except OSError:
        path.unlink(missing_ok=True)
        raise

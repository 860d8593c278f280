"""Opening a store: its manifest and the end of every part, and where the rows of a feature are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_scope.errors import FormatError, NotFoundError
from qwen_scope.files import Remote, place

from .layout import MANIFEST, TABLES, Manifest
from .parts import TableRows, check_parts, check_rows


def is_store(folder: str | Path) -> bool:
    """Whether a folder is a finished store."""
    return (place(folder) / MANIFEST).is_file()


def read_manifest(folder: Path | Remote) -> Manifest:
    """The manifest of a store.

    Raises:
        NotFoundError: there is no store.   FormatError: it is damaged, or not what the format says.
    """
    if isinstance(folder, Remote):
        folder.refresh()
        if not (folder / MANIFEST).is_file():
            raise NotFoundError(_absent(folder))
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{folder / MANIFEST} is not UTF-8") from error
    except OSError as error:
        raise NotFoundError(_absent(folder)) from error
    return Manifest.from_json(text)


def open_tables(folder: Path | Remote, manifest: Manifest) -> dict[str, TableRows]:
    """The tables of a store, each part checked by its end.

    Raises:
        NotFoundError: a part is missing.   FormatError: a part is not what the manifest and the format say.
    """
    files = check_parts(folder, manifest)
    tables = {name: TableRows(name, files[name]) for name in TABLES}
    check_rows(tables, manifest, folder)
    return tables


@dataclass(frozen=True)
class Places:
    """Where the rows of each feature are: in `stats`, and by it in `features`."""

    folder: Path | Remote
    manifest: Manifest
    tables: Mapping[str, TableRows]

    def start(self, layer: int) -> int:
        """The number of a layer's first row in `stats`."""
        layers = self.manifest.layers
        return sum(layers[other].d_sae for other in layers if other < layer)

    def row(self, layer: int, feature: int) -> dict[str, Any]:
        """A feature's row of `stats`."""
        return self.tables["stats"].read(self.start(layer) + feature, 1).to_pylist()[0]

    def rows(self, layer: int, feature: int) -> tuple[int, int]:
        """The first row of a feature in `features`, and how many rows it has.

        Raises:
            FormatError: the rows of `stats` are not in order.
        """
        row = self.row(layer, feature)
        if (row["layer"], row["feature"]) != (layer, feature):
            raise FormatError(f"the stats of {self.folder} are not in order at layer {layer}, feature {feature}")
        self.tables["features"].check(row["first_row"], row["tokens"])
        return row["first_row"], row["tokens"]


def _absent(folder: Path | Remote) -> str:
    if folder.is_dir():
        return (
            f"{folder} has no {MANIFEST}: it is no store, or one that is not finished; run the command that began it"
            " again"
        )
    return f"there is no store {str(folder)!r}"

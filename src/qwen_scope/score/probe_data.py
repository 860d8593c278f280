"""The labelled texts of sae-probes (Kantamneni et al. 2025, arXiv 2502.16681), read from its wheel without its code."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import final

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc

from qwen_scope.errors import NotFoundError, foreign

from .labelled import Labelled, Quadrants, check_dataset, quadrants

PACKAGE, LIST = "sae_probes", "probing_datasets_MASTER.csv.zst"
BINARY = "Binary Classification"


SETS = {
    "code": ("158_code_C", "159_code_Python", "160_code_HTML"),
    "agnews": ("161_agnews_0", "162_agnews_1", "163_agnews_2"),
    "news": ("139_news_class_Politics", "140_news_class_Technology", "141_news_class_Entertainment"),
    "sport": ("154_athlete_sport_football", "155_athlete_sport_basketball", "156_athlete_sport_baseball"),
}
"""Datasets that tell one value of the same thing from all others: their positive texts are the classes of a set."""
PAIRS = {
    "trump x front page": ("21_headline_istrump", "26_headline_isfrontpage"),
    "politician x male": ("7_hist_fig_ispolitician", "5_hist_fig_ismale"),
    "actor x male": ("61_wikidata_occupation_isactor", "56_wikidatasex_or_gender"),
    "alive x male": ("57_wikidatais_alive", "56_wikidatasex_or_gender"),
}
"""Datasets that label some of the same texts."""


@final
class ProbeData:
    """The binary datasets, by name such as `87_glue_cola`.

    Args:
        place: the package's folder or wheel (pip download --no-deps sae-probes); None where it is installed.

    Raises:
        NotFoundError: it is not there, or not installed.
    """

    def __init__(self, place: Path | None = None) -> None:
        if place is None:
            found = find_spec(PACKAGE)  # finding does not import it: its code wants other packages
            where = list(found.submodule_search_locations or ()) if found else []
            if not where:
                raise NotFoundError(
                    "sae-probes is not installed: fetch its wheel with pip download --no-deps sae-probes,"
                    " and name the file"
                )
            place = Path(where[0])
        self.place, self._names = place, _files(place)
        rows = self._table(LIST).to_pylist()
        saved = [str(row["Dataset save name"]) for row in rows if row["Data type"] == BINARY]
        self.files = {Path(name).stem: f"{name}.zst" for name in saved}

    @property
    def names(self) -> list[str]:
        """All of them, in the order of their list."""
        return list(self.files)

    @property
    def sets(self) -> list[str]:
        """Those of `SETS` that are there."""
        return [name for name, parts in SETS.items() if set(parts) <= set(self.files)]

    @property
    def pairs(self) -> list[str]:
        """Those of `PAIRS` that are there."""
        return [name for name, both in PAIRS.items() if set(both) <= set(self.files)]

    def __str__(self) -> str:
        return "sae-probes"

    def read(self, name: str) -> Labelled:
        """One dataset.

        Raises:
            NotFoundError: there is none of that name.
        """
        check_dataset(self, name)
        table = self._table(self.files[name])
        texts = [str(text) for text in table["prompt"].to_pylist()]
        y = np.unique([str(value) for value in table["target"].to_pylist()], return_inverse=True)[1]
        return Labelled(name, tuple(texts), y.astype(np.int64))

    def classes(self, name: str) -> Mapping[str, tuple[str, ...]]:
        """The positive texts of each dataset of a set."""
        read = {part: self.read(part) for part in SETS[name]}
        return {
            part: tuple(text for text, y in zip(one.texts, one.y, strict=True) if y == 1) for part, one in read.items()
        }

    def crossed(self, name: str) -> Quadrants:
        """Texts that have both labels of a pair."""
        first, second = PAIRS[name]
        return quadrants(self.read(first), self.read(second))

    def _table(self, name: str) -> pa.Table:
        with foreign(f"{name} of {self.place} can't be read"):
            data = self._bytes(name)
            with pa.CompressedInputStream(io.BytesIO(data), "zstd") as stream:
                parse = pc.ParseOptions(newlines_in_values=True)
                return pc.read_csv(stream, parse_options=parse, read_options=pc.ReadOptions(block_size=2**26))

    def _bytes(self, name: str) -> bytes:
        inside = self._names.get(name)
        if inside is None:
            raise NotFoundError(f"{self.place} holds no {name}: it is not the package sae-probes")
        if self.place.is_dir():
            return (self.place / inside).read_bytes()
        with zipfile.ZipFile(self.place) as wheel:
            return wheel.read(inside)


def _files(place: Path) -> dict[str, str]:
    """Where in the folder or wheel each file lies, by its name below `data`.

    Raises:
        NotFoundError: there is no such place, or it is neither.
    """
    if place.is_dir():
        every = [path.relative_to(place).as_posix() for path in place.rglob("*.zst")]
    elif zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as wheel:
            every = wheel.namelist()
    else:
        raise NotFoundError(f"{place} is neither a folder nor a wheel of sae-probes")
    return {name.partition("sae_probes/data/")[2] or name.removeprefix("data/"): name for name in every}

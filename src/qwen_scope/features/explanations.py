"""Labels of Neuronpedia beside a store: batches of its public data sets, kept as they came and given back unchanged.

They lie in the store's folder as `neuronpedia/SOURCE/explanations/batch-N.jsonl.gz`, byte for byte. A record says which
model explained a feature and by which method; how well its text holds was not measured here, so it is no `Label`.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from qwen_scope.errors import FormatError, InputError, NotFoundError, brief, foreign
from qwen_scope.files import write_whole
from qwen_scope.store import FeatureStore

FOLDER = "neuronpedia"
BATCH = re.compile(r"batch-[0-9]+\.jsonl(\.gz)?")
SOURCE = re.compile(r"([0-9]{1,4})-[A-Za-z0-9_.-]{1,200}")
LONGEST = 2**20
"""Characters of a record."""


@dataclass(frozen=True)
class Explanation:
    """What Neuronpedia says of a feature.

    Attributes:
        source: its name of layer and set, such as `15-qwenscope-res-32k`.   layer, feature: which.
        text: the label.   method, model: how it was made, "" where the record does not say.
    """

    source: str
    layer: int
    feature: int
    text: str
    method: str
    model: str

    @property
    def said(self) -> str:
        """The label with where it is from."""
        by = f" by {self.model}" if self.model else ""
        return f"{self.text} (Neuronpedia{by}; not scored here)"


def read_explanations(path: Path) -> Iterator[Explanation]:
    """The explanations of a batch, `batch-N.jsonl` or `.jsonl.gz`; fields that are not known here are passed over.

    Raises:
        FormatError: the file is damaged, or a line is no explanation.
    """
    with foreign(f"{path} can't be read"):
        data = path.read_bytes()
        lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = None
        with foreign(f"line {number} of {path} is no JSON"):
            record = json.loads(line) if len(line) <= LONGEST else None
        if not isinstance(record, dict):
            raise FormatError(f"line {number} of {path} is no explanation of Neuronpedia: an object of at most 1 MiB")
        source, index, text = (record.get(key) for key in ("layer", "index", "description"))
        layer = SOURCE.fullmatch(source) if isinstance(source, str) else None
        if layer is None or not str(index).isascii() or not str(index).isdigit() or not isinstance(text, str):
            raise FormatError(
                f"line {number} of {path} is no explanation of Neuronpedia: it has layer {brief(repr(source))}, index"
                f" {brief(repr(index))} and a description that is {type(text).__name__}"
            )
        method, model = (str(record.get(key) or "") for key in ("typeName", "explanationModelName"))
        yield Explanation(layer[0], int(layer[1]), int(str(index)), text, method, model)


def batches_in(path: str | os.PathLike[str]) -> list[Path]:
    """The batches that a file is or that lie in a folder, at any depth, by name.

    Raises:
        NotFoundError: there are none.
    """
    place = Path(path)
    found = [place] if place.is_file() else [p for p in place.rglob("batch-*") if BATCH.fullmatch(p.name)]
    found = [p for p in found if place.is_file() or p.parent.name not in ("features", "activations")]
    if not found:
        raise NotFoundError(
            f"there is no batch of explanations in {path}; name a batch-N.jsonl.gz, or a folder that holds some"
        )
    return sorted(found, key=lambda p: (len(p.name), p.as_posix()))


def is_explanations(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a batch of Neuronpedia's or a folder, rather than a file of entries that `label` exports."""
    return Path(path).is_dir() or BATCH.fullmatch(Path(path).name) is not None


def home_of(store: FeatureStore) -> Path | None:
    """The folder of a store for what was imported; None for a store at a URI."""
    return store.folder / FOLDER if isinstance(store.folder, Path) else None


def import_explanations(store: FeatureStore, path: str | os.PathLike[str]) -> int:
    """Keep batches of Neuronpedia's explanations with a store; how many explanations they hold.

    Nothing is kept unless every record is about a feature that the store's SAEs have. A batch that was imported before
    is replaced.

    Raises:
        NotFoundError: no batch, or a layer or feature that the store does not have.   FormatError: a damaged one.
        InputError: one that is about several sources, or about none.
    """
    home = home_of(store)
    if home is None:
        raise InputError(f"{store.folder} is read where it lies and not written; copy the store to a folder first")
    kept: dict[Path, Path] = {}
    total = 0
    for batch in batches_in(path):
        sources = set()
        for one in read_explanations(batch):
            d_sae = store.layer(one.layer).d_sae
            if one.feature >= d_sae:
                raise NotFoundError(
                    f"{batch} explains {one.layer}/{one.feature}; this SAE has features 0 to {d_sae - 1}"
                )
            sources.add(one.source)
            total += 1
        if len(sources) != 1:
            raise InputError(f"{batch} is about {len(sources)} sources; a batch of Neuronpedia is about one")
        name = batch.name if BATCH.fullmatch(batch.name) else "batch-0.jsonl.gz"
        kept[home / sources.pop() / "explanations" / name] = batch
    for target, batch in kept.items():
        with write_whole(target) as part:
            part.write_bytes(batch.read_bytes())
    return total


def export_explanations(store: FeatureStore, folder: str | os.PathLike[str]) -> int:
    """Write the batches that were imported to `FOLDER/SOURCE/explanations/`, byte for byte; how many files.

    Raises:
        NotFoundError: none was imported.   InputError: one of the files can't be written.
    """
    home = home_of(store)
    if home is None or not home.is_dir():
        raise NotFoundError(f"no explanation of Neuronpedia was imported into {store.folder}")
    found = batches_in(home)
    for batch in found:
        with write_whole(Path(folder) / batch.relative_to(home)) as part:
            part.write_bytes(batch.read_bytes())
    return len(found)


def explanations_of(store: FeatureStore, layer: int, feature: int) -> tuple[Explanation, ...]:
    """What was imported about one feature."""
    home = home_of(store)
    found: list[Explanation] = []
    for source in sorted(home.iterdir()) if home is not None and home.is_dir() else ():
        match = SOURCE.fullmatch(source.name)
        for batch in batches_in(source) if match is not None and int(match[1]) == layer else ():
            now = batch.stat()
            found += _by_feature(batch, now.st_mtime_ns, now.st_size).get(feature, ())
    return tuple(found)


@lru_cache(maxsize=64)
def _by_feature(batch: Path, changed: int, size: int) -> dict[int, list[Explanation]]:
    """The explanations of a file by feature, read again where it has changed."""
    out: dict[int, list[Explanation]] = {}
    for one in read_explanations(batch):
        out.setdefault(one.feature, []).append(one)
    return out

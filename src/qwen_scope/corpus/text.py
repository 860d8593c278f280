"""`Corpus`: documents with their metadata from wherever they are, in a fixed order, with a cursor."""

from __future__ import annotations

import json
import math
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, final

from qwen_scope.errors import InputError, NotFoundError, need

from .sources import SUFFIXES, UNITS, Problem, Source, dataset_rows, file_source, item_rows
from .unused import by_reason, tell_unused

DEEPEST = 50  # nested levels of metadata


@dataclass(frozen=True)
class Document:
    """One text or conversation.

    Attributes:
        text: a string, or a list of `{"role", "content"}` messages.
        meta: the other columns of its row, as plain JSON data.
        source, row: where it came from; rows count from 1.
    """

    text: str | list[dict[str, str]]
    meta: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    row: int = 0


@dataclass(frozen=True)
class Unreadable:
    """A row that could not be used: where it is, a reason to count by, and what came."""

    source: str
    row: int
    reason: str
    detail: str


@final
class Corpus:
    """Documents in a fixed order: files by name, rows as they stand.

    Args:
        source: a file or a folder of files (`.txt`, `.jsonl`, `.ndjson`, `.csv`, `.tsv`, also gzipped, `.parquet`), a
            folder written by `datasets`, a dataset of the Hub (`owner/name`, streamed), a `datasets` object, or a list
            of texts or of mappings.
        column: the column that holds the text: a string or a list of messages.
        unit: what one document of a `.txt` file is: a `paragraph` (up to a blank line), a `line`, or the `file`.
        sample: only so many rows, drawn evenly from all of them, in their order.
        seed: of the sample.
        split, subset: of a dataset of the Hub.
        name: what to call a list, so that an extraction that goes on knows it again.

    Raises:
        NotFoundError: there is no such file, dataset or package.   FormatError: a `.parquet` file is none.
        InputError: a folder without a file of a known kind, or a sample of a source whose size is not known.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[str] | Sequence[Mapping[str, Any]] | Any,
        *,
        column: str = "text",
        unit: str = "paragraph",
        sample: int | None = None,
        seed: int = 0,
        split: str = "train",
        subset: str | None = None,
        name: str | None = None,
    ) -> None:
        if unit not in UNITS:
            raise InputError(f"a document of a text file is one of {', '.join(UNITS)}, not {unit!r}")
        self.column = column
        self.sources, self.name = find_sources(source, unit, split, subset, name)
        self.options = {
            "column": column,
            "unit": unit,
            "sample": sample,
            "seed": seed,
            "split": split,
            "subset": subset,
        }
        self._at, self._rows, self._offset, self._seen = 0, 0, 0, 0
        self._lacking: Mapping[str, Any] | None = None  # the first row without the column
        self._chosen = None if sample is None else self._draw(sample, seed)

    @property
    def description(self) -> dict[str, Any]:
        """What decides which documents come: the sources with their sizes, and the options."""
        return {"sources": [[source.name, source.size] for source in self.sources], **self.options}

    @property
    def share(self) -> float | None:
        """How much has been read, from 0 to 1, or None where the size is not known."""
        if any(source.size is None for source in self.sources):
            return None
        total = sum(source.size or 0 for source in self.sources)
        done = sum(source.size or 0 for source in self.sources[: self._at]) + self._offset
        return min(1.0, done / total) if total else 1.0

    def other_columns(self, parameter: str = "column") -> str:
        """The end of a sentence about a corpus without a document: which columns its rows have in place of the one
        that was asked for, and which to pass as `parameter`; nothing where that is not the reason."""
        if self._lacking is None:
            return ""
        texts = {name: value for name, value in self._lacking.items() if isinstance(value, str) and value}
        best = next((name for name, value in texts.items() if " " in value.strip()), next(iter(texts), None))
        has = ", ".join(map(repr, islice(self._lacking, 20))) or "none"
        said = f": its rows have no column {self.column!r} but {has}"
        return said if best is None else f"{said}; pass {parameter}={best!r}"

    def cursor(self) -> dict[str, int]:
        """The place after the row taken last: plain data."""
        return {"source": self._at, "rows": self._rows, "offset": self._offset, "seen": self._seen}

    def seek(self, cursor: Mapping[str, int]) -> None:
        """Go on from a cursor of the same corpus; to be called before the first row is taken."""
        self._at, self._rows = int(cursor["source"]), int(cursor["rows"])
        self._offset, self._seen = int(cursor["offset"]), int(cursor["seen"])

    def __iter__(self) -> Iterator[Document]:
        """The documents alone; how many rows could not be used is said in a warning at the end. `rows` has them.

        Raises:
            InputError: at the end, where no row could be used.
        """
        used, unused = 0, Counter[str]()
        for found in self.rows():
            if isinstance(found, Document):
                used += 1
                yield found
            else:
                unused[found.reason] += 1
        if unused and not used:
            raise InputError(f"no row of {self.name} can be used: {by_reason(unused)}{self.other_columns()}")
        tell_unused(unused, used + unused.total(), self.name)

    def rows(self) -> Iterator[Document | Unreadable]:
        """Every row from the cursor on."""
        while self._at < len(self.sources):
            source = self.sources[self._at]
            for raw in source.read(self._rows, self._offset):
                self._rows, self._offset, self._seen = raw.row, raw.offset, self._seen + 1
                if self._chosen is None or self._seen - 1 in self._chosen:
                    value = raw.parse()
                    if self._lacking is None and isinstance(value, Mapping) and self.column not in value:
                        self._lacking = value
                    yield document_of(value, self.column, source.name, raw.row)
            self._at, self._rows, self._offset = self._at + 1, 0, 0

    def _draw(self, sample: int, seed: int) -> set[int] | None:
        """The numbers of the rows of the sample."""
        if sample < 1:
            raise InputError(f"a sample has at least one row, not {sample}")
        if any(source.name.startswith("hub:") for source in self.sources):
            raise InputError("a streamed dataset has no known size to sample from; load it with datasets and pass it")
        total = sum(sum(1 for _ in source.read(0, 0)) for source in self.sources)
        return None if sample >= total else set(random.Random(seed).sample(range(total), sample))


def find_sources(
    source: Any, unit: str, split: str, subset: str | None, name: str | None = None
) -> tuple[list[Source], str]:
    """The sources that a name or an object stands for, and what to call them together."""
    if not isinstance(source, str | os.PathLike):
        size = len(source) if hasattr(source, "__len__") else None
        if hasattr(source, "skip"):
            return [Source(name or "dataset", size, partial(dataset_rows, source))], name or "dataset"
        return [Source(name or "list", size, partial(item_rows, source))], name or "list"
    path = Path(source).expanduser()
    if path.is_file():
        if not known(path):
            raise InputError(f"{path} is no corpus this package reads; it reads {', '.join(SUFFIXES)}, also with .gz")
        return [file_source(path, path.name, unit)], path.name
    if path.is_dir():
        if (path / "dataset_info.json").is_file():
            dataset = datasets_package().load_from_disk(str(path))
            return [Source(path.name, len(dataset), partial(dataset_rows, dataset))], path.name
        files = sorted(p for p in path.rglob("*") if p.is_file() and known(p))
        if not files:
            raise InputError(f"{path} holds no file that ends with {', '.join(SUFFIXES)}")
        return [file_source(p, p.relative_to(path).as_posix(), unit) for p in files], path.name
    name = str(source)
    if path.is_absolute() or name.count("/") != 1 or name.startswith((".", "~")) or known(path):
        raise NotFoundError(f"there is no file, folder or dataset {name!r}")
    datasets = datasets_package()
    try:
        stream = datasets.load_dataset(name, subset, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise NotFoundError(
            f"there is no file {name!r} here, and the Hub does not give it as a dataset: {said}"
        ) from error
    return [Source(f"hub:{name}", None, partial(dataset_rows, stream))], name


def known(path: Path) -> bool:
    """Whether the name is that of a kind of file a corpus can be read from."""
    inner = path.with_suffix("") if path.suffix == ".gz" else path
    return inner.suffix in SUFFIXES and not (inner.suffix == ".parquet" and path.suffix == ".gz")


def datasets_package() -> Any:
    """The package `datasets`."""
    need("reading a dataset", "datasets")
    import datasets

    return datasets


def document_of(value: Any, column: str, source: str, row: int) -> Document | Unreadable:
    """The document in a row, or why there is none."""
    found = text_of(value, column)
    source = source.encode("utf-8", "replace").decode()
    if isinstance(found, Problem):
        return Unreadable(source, row, found.reason, found.detail.encode("utf-8", "replace").decode()[:500])
    rest = {str(k): plain(v) for k, v in value.items() if k != column} if isinstance(value, Mapping) else {}
    return Document(found, rest, source, row)


def text_of(value: Any, column: str) -> str | list[dict[str, str]] | Problem:
    """The text or the messages in a row."""
    if isinstance(value, Problem):
        return value
    if isinstance(value, Mapping):
        if column not in value:
            has = ", ".join(map(repr, islice(value, 20)))
            return Problem("missing column", f"no {column!r}; it has {has or 'none'}")
        value = value[column]
    if isinstance(value, str):
        content, found = [value], value
    elif isinstance(value, list) and value and all(isinstance(m, Mapping) for m in value):
        found = [{str(k): v for k, v in message.items() if isinstance(v, str)} for message in value]
        if not all({"role", "content"} <= set(message) for message in found):
            return Problem("not text", "a message lacks role or content")
        content = [text for message in found for text in message.values()]
    else:
        return Problem("not text", f"{type(value).__name__}: {value!r:.100}")
    if not any(content):
        return Problem("empty", "no character")
    for text in content:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                return Problem("not Unicode", f"half a surrogate pair at character {error.start}")
    return found


def plain(value: Any, depth: int = 0) -> Any:
    """Metadata as JSON keeps it: what JSON does not know, or nests too deep, becomes text."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping) and depth < DEEPEST:
        return {plain(str(k)): plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple) and depth < DEEPEST:
        return [plain(v, depth + 1) for v in value]
    return plain(f"{type(value).__name__}" if depth >= DEEPEST else str(value))


def meta_json(meta: Mapping[str, Any]) -> str:
    """The metadata of a document as the store keeps it."""
    return json.dumps(plain(meta), ensure_ascii=False)

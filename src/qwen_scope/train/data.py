"""Documents from wherever they are, and token rows packed from them, with a cursor."""

from __future__ import annotations

import gzip
import json
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qwen_scope.errors import (
    FormatError,
    InputError,
    NotFoundError,
    QwenScopeError,
    QwenScopeWarning,
    foreign,
    need,
    reason,
)

Document = str | Sequence[Mapping[str, Any]]
OTHERS = (".json", ".ndjson", ".csv", ".tsv", ".gz", ".zst", ".md", ".arrow")  # of files, not of datasets of the Hub
SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")

# Documents are tokenised so many at a time.
CHUNK = 64


class Documents:
    """Texts or conversations, in a fixed order, epoch after epoch if asked to, with a cursor.

    Args:
        source: a `.txt` (documents between blank lines), `.jsonl` (one object per line, gzipped or not) or `.parquet`
            file, a folder of such files, a Hugging Face dataset (`owner/name`, streamed), `lab` for the lab's corpus,
            or an iterable of texts or conversations.
        field: the column of JSONL, Parquet and datasets: a text, or a list of `{"role", "content"}` messages.
        split, subset: of a Hugging Face dataset; `split` also of the lab.
        repeat: begin again at the end. A source that can be read only once then ends.
        rank, world: every `world`-th document, from `rank` on: the share of one process.
        hold_out: keep every so-manieth document, the first included, out of training; 0 keeps none.
        held_out: give the documents that are kept out, instead of the others.

    A row that holds no document (no JSON, no such field, no text in it, no UTF-8) keeps its number and is passed over;
    `passed_over` counts them, and a `QwenScopeWarning` says so at the end of the first pass or when `tell` is called.

    Raises:
        NotFoundError: no such file, folder or package.   InputError: a folder without a file of a known kind.
        InputError, FormatError: while it is read: no row holds a document; what is said is about the first.
    """

    def __init__(
        self, source: str | Path | Iterable[Document], *, field: str = "text", split: str = "train",
        subset: str | None = None, repeat: bool = True, rank: int = 0, world: int = 1, hold_out: int = 0,
        held_out: bool = False,
    ) -> None:  # fmt: skip
        if hold_out < 0 or hold_out == 1:
            raise InputError(
                f"hold_out {hold_out} would leave nothing to train on; 100 keeps one document in a hundred"
            )
        self.read = reader_of(source, field, split, subset)
        self.repeat = repeat and not isinstance(source, Iterator)
        self.rank, self.world, self.hold_out, self.held_out = rank, world, hold_out, held_out
        self.epoch, self.document = 0, 0
        self.name = str(source) if isinstance(source, str | Path) else "the documents"
        self.passed_over, self._told = 0, False
        self._first: QwenScopeError | None = None

    def __iter__(self) -> Iterator[Document]:
        while True:
            before, used = self.document, 0
            for document in self.share():
                self.document += 1
                if isinstance(document, QwenScopeError):
                    self._pass_over(document)
                    continue
                used += 1
                yield document
            if self._first is not None:
                if not (used or before or self.held_out):
                    raise self._first
                self.tell()
            if not self.repeat or (self.document == before == 0):
                return
            self.epoch, self.document = self.epoch + 1, 0

    def _pass_over(self, problem: QwenScopeError) -> None:
        self._first = self._first or problem
        self.passed_over += not self._told  # a further pass meets the same rows

    def tell(self) -> None:
        """Say once how many rows were passed over, if any were."""
        if self._first is not None and not self._told:
            self._told = True
            rows = f"{self.passed_over} rows" if self.passed_over > 1 else "1 row"
            warnings.warn(
                f"{rows} of {self.name} can't be used and are passed over; the first: {self._first}",
                QwenScopeWarning,
                2,
            )

    def share(self) -> Iterator[Document | QwenScopeError]:
        """The rows of this share that are still to come in this epoch: documents, or why there is none."""
        wanted = self.document * self.world + self.rank
        start = self.place_of(wanted)
        for place, document in enumerate(self.read(start), start):
            if place == self.place_of(wanted):
                wanted += self.world
                yield document

    def place_of(self, number: int) -> int:
        """Where the source holds the `number`-th document, counted over all shares."""
        if not self.hold_out:
            return number
        return number * self.hold_out if self.held_out else number + number // (self.hold_out - 1) + 1

    def cursor(self) -> dict[str, int]:
        """How many documents of which epoch have been taken."""
        return {"epoch": self.epoch, "document": self.document}

    def seek(self, cursor: Mapping[str, Any]) -> None:
        """Go on from a cursor; to be called before the first document is taken."""
        self.epoch, self.document = int(cursor["epoch"]), int(cursor["document"])


# All rows from a number on: documents, or why a row holds none.
Reader = Callable[[int], Iterator[Document | QwenScopeError]]


def reader_of(source: str | Path | Iterable[Document], field: str, split: str, subset: str | None) -> Reader:
    """The function that reads a source from any document on."""
    if not isinstance(source, str | Path):
        return lambda start: (found_in(one, "a document") for one in islice(source, start, None))
    if source == "lab":
        from qwen_scope.lab import documents

        return lambda start: (d.text for d in islice(documents(split=split, n=None), start, None))
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES))
        if not files:
            raise InputError(f"{path} holds no file that ends with {', '.join(SUFFIXES)}")
        return lambda start: islice((d for file in files for d in file_documents(file, field)), start, None)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"{path} is not text this package reads; name a file that ends with {', '.join(SUFFIXES)}")
        return lambda start: islice(file_documents(path, field), start, None)
    named_file = path.name.endswith((*SUFFIXES, *OTHERS))
    if path.is_absolute() or str(source).count("/") != 1 or str(source).startswith((".", "~")) or named_file:
        raise NotFoundError(f"there is no file or folder {str(source)!r}")
    return hub_reader(str(source), field, split, subset)


def hub_reader(name: str, field: str, split: str, subset: str | None) -> Reader:
    """A streamed Hugging Face dataset: nothing is stored, so it may be larger than the disk."""
    need(f"{name!r} is no file here, and reading it from the Hub", "datasets")
    import datasets

    with foreign(f"there is no file {name!r} here, and the Hub does not give it as a dataset", NotFoundError):
        stream = datasets.load_dataset(name, subset, split=split, streaming=True)

    def rows(start: int) -> Iterator[Document | QwenScopeError]:
        with foreign(f"the dataset {name!r} can't be read on"):
            for row in stream.skip(start):
                yield value_of(row, field, f"a row of {name}")

    return rows


def file_documents(path: Path, field: str) -> Iterator[Document | QwenScopeError]:
    """The rows of one file, in order; where it is damaged, what follows is one row that holds no document."""
    if path.suffix == ".parquet":
        yield from parquet_documents(path, field)
        return
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            if ".jsonl" in path.suffixes:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield parsed(line, path, number, field)
            else:
                yield from paragraphs(lines, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield FormatError(f"{path} can't be unzipped to its end: {error}")
    except OSError as error:
        yield FormatError(f"{path} can't be read: {reason(error)}")


def paragraphs(lines: Iterable[bytes], path: Path) -> Iterator[Document | QwenScopeError]:
    """The texts between blank lines."""
    held: list[bytes] = []
    for line in lines:
        if line.strip():
            held.append(line)
        elif held:
            yield decoded(b"".join(held), str(path))
            held.clear()
    if held:
        yield decoded(b"".join(held), str(path))


def decoded(data: bytes, where: str) -> str | QwenScopeError:
    """Text from bytes, its lines ending in newlines."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        return FormatError(f"{where} is not UTF-8 text: {error}")


def parquet_documents(path: Path, field: str) -> Iterator[Document | QwenScopeError]:
    """The rows of a Parquet file, a few hundred in memory at a time."""
    from pyarrow import ArrowInvalid, parquet

    try:
        file = parquet.ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise FormatError(f"{path} is not a Parquet file: {error}") from error
    if field not in file.schema_arrow.names:
        raise InputError(f"{path} has no column {field!r}; it has {', '.join(file.schema_arrow.names)}")
    number = 0
    with foreign(f"{path} can't be read on"):
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield found_in(value, f"the field {field!r} of row {number} of {path}")


def parsed(line: bytes, path: Path, number: int, field: str) -> Document | QwenScopeError:
    """The document in one line of JSONL."""
    where = f"line {number} of {path}"
    text = decoded(line, where)
    if isinstance(text, QwenScopeError):
        return text
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return FormatError(f"{where} is not JSON: {reason(error)}")
    return value_of(row, field, where)


def value_of(row: Any, field: str, where: str) -> Document | QwenScopeError:
    """The document in one row."""
    if not isinstance(row, Mapping) or field not in row:
        has = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        texts = [key for key, one in row.items() if isinstance(one, str | list)] if isinstance(row, Mapping) else []
        best = next((key for key in texts if " " in str(row[key])), texts[0] if texts else None)
        other = "" if best is None else f"; pass field={best!r}"
        return InputError(f"{where} has no field {field!r}; it has {has}{other}")
    return found_in(row[field], f"the field {field!r} of {where}")


def found_in(value: Any, where: str) -> Document | QwenScopeError:
    """A document, if a value is one: a text or a conversation with something in it."""
    if isinstance(value, str):
        parts = [value]
    elif isinstance(value, Sequence) and all(isinstance(one, Mapping) and "role" in one for one in value):
        parts = [str(one.get("content") or "") for one in value]
    elif isinstance(value, list):
        return InputError(f"{where} is a list, but not of messages with a role")
    else:
        return InputError(f"{where} is {type(value).__name__}, not a text or a list of messages")
    if not any(parts):
        return InputError(f"{where} is empty")
    try:
        "".join(parts).encode()
    except UnicodeEncodeError:
        return FormatError(f"{where} is no Unicode text: it holds half a surrogate pair")
    return value


class TokenRows:
    """Documents packed into full rows of tokens: one after the other, the tokenizer's end-of-text token between them.

    No BOS is added unless the tokenizer itself adds one, and no row is padded. A document may be cut over two rows.

    Args:
        row: tokens per row.   rows: rows per batch.
        chat: render conversations with the tokenizer's chat template; a plain text becomes one user message.

    Raises:
        InputError: the tokenizer has no chat template, or a document is a conversation and `chat` is off.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        *,
        row: int = 512,
        rows: int = 16,
        chat: bool = False,
    ) -> None:
        if chat and not tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template; read the texts without chat")
        if row < 1 or rows < 1:
            raise InputError(f"a batch needs at least one row of one token, got {rows} rows of {row}")
        self.documents, self.tokenizer, self.chat = documents, tokenizer, chat
        self.row, self.rows = row, rows
        # Documents with tokens not yet given out: where each stood, and its ids.
        self.waiting: deque[tuple[dict[str, int], list[int]]] = deque()
        self.taken_of_first = 0

    def __iter__(self) -> Iterator[Int[Tensor, "rows row"]]:
        stream = iter(self.documents)
        need = self.row * self.rows
        held = sum(len(ids) for _, ids in self.waiting) - self.taken_of_first
        while True:
            while held < need:
                found = self.tokenised(stream)
                if not found:
                    break
                self.waiting.extend(found)
                held += sum(len(ids) for _, ids in found)
            rows = min(self.rows, held // self.row)
            if rows < 1:
                return
            yield torch.tensor(self.take(rows * self.row), dtype=torch.int64).view(rows, self.row)
            held -= rows * self.row

    def tokenised(self, stream: Iterator[Document]) -> list[tuple[dict[str, int], list[int]]]:
        """The next few documents, each with its place."""
        places, texts = [], []
        while len(texts) < CHUNK:
            document = next(stream, None)
            if document is None:
                break
            now = self.documents.cursor()
            places.append({**now, "document": now["document"] - 1})
            texts.append(self.text_of(document))
        if not texts:
            return []
        last: Any = self.tokenizer.eos_token_id
        end: list[int] = [] if last is None else [last]
        ids: Any = self.tokenizer(texts, add_special_tokens=not self.chat, verbose=False)["input_ids"]
        return [(place, [*some, *end]) for place, some in zip(places, ids, strict=True)]

    def text_of(self, document: Document) -> str:
        """A document as it will be tokenised."""
        if not self.chat:
            if not isinstance(document, str):
                raise InputError("a document is a list of messages; read it with chat on")
            return document
        messages = [{"role": "user", "content": document}] if isinstance(document, str) else [dict(m) for m in document]
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False)
        assert isinstance(rendered, str)
        return rendered

    def take(self, n: int) -> list[int]:
        """The next n tokens; where it stops is remembered as a document and an offset in it."""
        out: list[int] = []
        while len(out) < n:
            ids = self.waiting[0][1]
            part = ids[self.taken_of_first : self.taken_of_first + n - len(out)]
            out += part
            self.taken_of_first += len(part)
            if self.taken_of_first == len(ids):
                self.waiting.popleft()
                self.taken_of_first = 0
        return out

    def cursor(self) -> dict[str, int]:
        """The document that the next token is from, and how many of its tokens are given out."""
        place = self.waiting[0][0] if self.waiting else self.documents.cursor()
        return {**place, "offset": self.taken_of_first}

    def seek(self, cursor: Mapping[str, Any]) -> None:
        """Go on from a cursor; to be called before the first batch is taken."""
        self.documents.seek(cursor)
        self.waiting.clear()
        self.taken_of_first = int(cursor["offset"])

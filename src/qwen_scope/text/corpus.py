"""`Corpus`: documents with their metadata from wherever they are, in a fixed order, with a cursor."""

from __future__ import annotations

import copy
import os
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any, final

from qwen_scope.errors import FormatError, InputError, check_count

from .document import Document, Unreadable, document_of, parts_of
from .lab import is_lab
from .options import CorpusOptions, template_columns
from .read import Raw
from .shuffle import BLOCK, BLOCK_CHARACTERS, Blocks, Counts, Strands, count, countable, size_of
from .source import find_sources
from .unused import by_reason, tell_unused, the_first

# A source is given up when this many rows from its beginning held no document.
HOPELESS = 10_000


@final
class Corpus:
    """Documents in a fixed order: files by name, rows as they stand; or, with `shuffle`, in one drawn by a seed.

    A row that holds no document keeps its number and is passed over; how many were is said in a warning at the end.

    Args:
        source: a file or a folder of files (`.txt`, `.jsonl`, `.ndjson`, `.csv`, `.tsv`, `.parquet`, also gzipped;
            stores of features in it are passed over), a folder written by `datasets`, a dataset of the Hub
            (`owner/name`, streamed), `lab` or some of its documents (`lab:language=de,register!=rude`; without end,
            unless there is a `sample`), a `datasets` object, a frame of pandas or polars, an Arrow table, a mapping of
            columns, or texts or mappings in a list or from a generator; `Together` for several of those that have
            names.
        column: the column that holds the text: a string or a list of messages.
        template: make the text of several columns instead, such as "{question}\\n{answer}" (`CorpusOptions`).
        unit: what one document of a `.txt` file is: a `paragraph` (up to a blank line), a `line`, or the `file`.
        sample: only this many rows, drawn evenly from all of them, in their order; of the lab the first ones.
        seed: of the sample, and of the lab's documents.
        split: of a dataset, a dictionary of splits, or the lab.
        subset: of a dataset of the Hub.
        name: what to call an object, so that an extraction that is resumed knows it again.
        hold_out: of training: keep every `hold_out`-th row, the first included, for measuring; 0 keeps none.
        held_out: give the rows that are kept, instead of the others.
        rank, world: every `world`-th of the rows, from `rank` on, which counts from 0: the share of one process.
        repeat: begin again at the end; a source that can be read only once then ends.
        shuffle: a seed: mix the sources in proportion to their rows, and the rows within each, as `text.shuffle` says.
            Which rows are kept or shared does not depend on it. None keeps the order, in which stores are written.
        longest: with `shuffle`, cut texts of more characters than this into parts (`parts_of`), each with a place of
            its own in the order, so that a long text is not read in one go; None cuts none.
        quiet: no warning of rows that can't be used: another reading of the same documents gives it.

    Attributes:
        name: what the source is called.
        endless: whether documents never end.   once: whether the source can be read only once.
        epoch: how often it has begun again.
        used: documents of the first pass so far.   unused: rows of the first pass without one, by reason.

    Raises:
        NotFoundError: there is no such file, dataset, split or package.   FormatError: a `.parquet` file is none.
        InputError: a folder without a file of a known kind, a store, an object without documents, a sample of a source
            whose size is not known, or a share that there is not.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Iterable[Any] | Any,
        *,
        column: str = "text",
        template: str | None = None,
        unit: str = "paragraph",
        sample: int | None = None,
        seed: int = 0,
        split: str = "train",
        subset: str | None = None,
        name: str | None = None,
        hold_out: int = 0,
        held_out: bool = False,
        rank: int = 0,
        world: int = 1,
        repeat: bool = False,
        shuffle: int | None = None,
        longest: int | None = None,
        quiet: bool = False,
    ) -> None:
        asked = asdict(CorpusOptions(column, unit, sample, seed, split, subset, template=template))
        if hold_out < 0 or hold_out == 1:
            raise InputError(
                f"hold_out {hold_out} would leave nothing to train on; 100 keeps one document in a hundred"
            )
        if shuffle is not None:
            check_count("shuffle", shuffle, 0)
        if longest is not None:
            check_count("longest", longest, 1)
        if not 0 <= rank < world:
            raise InputError(f"there is no share {rank + 1}/{world}; they are 1/{world} to {world}/{world}")
        self.column, self.rank, self.world = column, rank, world
        self.shuffle, self.longest = shuffle, None if shuffle is None else longest
        self.template = template
        self._wanted_columns = [column] if template is None else template_columns(template)
        self.hold_out, self.held_out = hold_out, held_out
        self.once = isinstance(source, Iterator)
        self.repeat = repeat and not self.once
        self.sources, self.name = find_sources(
            source, unit=unit, split=split, subset=subset, seed=seed, n=sample, name=name
        )
        # A corpus without a template is described as it was before there were any: stores go on.
        without = ("chat",) if template is not None else ("chat", "template")
        self.options = {name: value for name, value in asked.items() if name not in without}
        lab = is_lab(source)
        self.endless = self.repeat or (lab and sample is None)
        self.epoch, self._at, self._rows, self._offset, self._seen, self._before = 0, 0, 0, 0, 0, 0
        self._numbered_apart = len(self.sources) > 1 and not countable(self.sources)
        self._blocks = Blocks()
        self._counted: Counts | None = None  # of the sources, once they are read shuffled
        self.used, self.unused, self._told = 0, Counter[str](), quiet
        self._first: Unreadable | None = None  # the first row that can't be used
        self._lacking: Mapping[str, Any] | None = None  # the first row without the column
        self._missing = column
        self._drawn = None if sample is None or lab else self._draw(sample, seed)

    @classmethod
    def of(cls, source: str | os.PathLike[str] | Iterable[Any] | Any, options: CorpusOptions, **share: Any) -> Corpus:
        """The corpus of a source read with `options`; `share` takes the other arguments, such as `rank` and `name`.

        Its `chat` is for what turns the documents into tokens.
        """
        chosen = asdict(options)
        del chosen["chat"]
        return cls(source, **chosen, **share)

    @property
    def description(self) -> dict[str, Any]:
        """What decides which documents come: the sources with their sizes, the options, and which share it is of how
        many, counted from 1, where it is one."""
        share = {"share": [self.rank + 1, self.world]} if self.world > 1 else {}
        return {"sources": [[source.name, source.size] for source in self.sources], **self.options, **share}

    def whole(self) -> Corpus:
        """The corpus that this is a share of, from its beginning.

        Raises:
            InputError: it can be read only once.
        """
        if self.once:
            raise InputError(f"{self.name} can be read only once, so a share of it can't be; make a list of it")
        whole = copy.copy(self)
        whole.rank, whole.world = 0, 1
        whole.epoch, whole._at, whole._rows, whole._offset, whole._seen, whole._before = 0, 0, 0, 0, 0, 0
        whole._blocks, whole.used, whole.unused, whole._told, whole._first = Blocks(), 0, Counter(), True, None
        return whole

    @property
    def progress(self) -> float | None:
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
        texts = {name: value for name, value in self._lacking.items() if isinstance(value, str | list) and value}
        spoken = (name for name, value in texts.items() if isinstance(value, list) or " " in value.strip())
        best = next(spoken, next(iter(texts), None))
        has = ", ".join(map(repr, islice(self._lacking, 20))) or "none"
        said = f": its rows have no column {self._missing!r} but {has}"
        if self.template is not None:
            return f"{said}; name those in the template"
        return said if best is None else f"{said}; pass {parameter}={best!r}"

    def cursor(self) -> dict[str, Any]:
        """The place after the row taken last, and how many rows of the first pass were of use: plain data."""
        read = {"epoch": self.epoch, "used": self.used, "unused": dict(self.unused)}
        if self.shuffle is not None:
            return {**read, **vars(self._blocks), "longest": self.longest}
        place = {"source": self._at, "rows": self._rows, "offset": self._offset, "seen": self._seen}
        return {**read, **place, "before": self._before}

    def seek(self, cursor: Mapping[str, Any]) -> None:
        """Go on from a cursor of the same corpus; to be called before the first row is taken.

        Raises:
            FormatError: the cursor is of documents in another order.
        """
        if ("served" in cursor) is (self.shuffle is None):
            kept, here = ("in order", "shuffled") if self.shuffle is not None else ("shuffled", "in order")
            raise FormatError(f"the place in {self.name} was kept while it was read {kept}, and here it is read {here}")
        if cursor.get("longest") != self.longest:
            raise FormatError(
                f"the place in {self.name} was kept while texts were cut at {cursor.get('longest')} characters, here at"
                f" {self.longest}; finish what was begun with the version that began it"
            )
        self.epoch = int(cursor.get("epoch", 0))
        self.used, self.unused = int(cursor.get("used", 0)), Counter(cursor.get("unused", {}))
        if self.shuffle is not None:
            self._blocks = Blocks(int(cursor["block"]), int(cursor["served"]), cursor["strands"])
            return
        self._at, self._rows, self._offset = int(cursor["source"]), int(cursor["rows"]), int(cursor["offset"])
        self._seen, self._before = int(cursor["seen"]), int(cursor.get("before", 0))

    def __iter__(self) -> Iterator[Document]:
        """The documents alone; `rows` also has the rows that can't be used.

        Raises:
            InputError: at the end of a pass from the beginning, where no row could be used.
        """
        while True:
            whole, taken = self._at_start, 0
            for found in self._pass():
                if isinstance(found, Document):
                    taken += 1
                    yield found
                elif whole and not self.used and self.unused.total() == HOPELESS:
                    raise self._no_use(f"none of the first {HOPELESS:,} rows")
            if whole and not self.used and self.unused and not self.held_out:
                raise self._no_use("no row")
            self.tell()
            if (whole and not taken) or not self._again():
                return

    def rows(self) -> Iterator[Document | Unreadable]:
        """Every row of the share, from the cursor on, also those that can't be used; nothing is said about them."""
        while True:
            whole, taken = self._at_start, 0
            for found in self._pass():
                taken += 1
                yield found
            if (whole and not taken) or not self._again():
                return

    def tell(self) -> None:
        """Say in a warning how many rows of the first pass can't be used, if there are any and it was not said yet."""
        if not self._told and self.unused:
            self._told = True
            tell_unused(self.unused, self.used + self.unused.total(), self.name, self._first)

    @property
    def _at_start(self) -> bool:
        return self._seen == 0 and self._blocks.strands is None

    def _pass(self) -> Iterator[Document | Unreadable]:
        """The rows of the share that are still to come in this pass."""
        for found in self._in_order() if self.shuffle is None else self._in_blocks(self.shuffle):
            if self.epoch == 0:
                if isinstance(found, Document):
                    self.used += found.part == 0
                else:
                    self.unused[found.reason] += 1
                    self._first = self._first or found
            yield found

    def _in_order(self) -> Iterator[Document | Unreadable]:
        while self._at < len(self.sources):
            for raw in self.sources[self._at].read(self._rows, self._offset):
                number = self._at + self._seen - self._before if self._numbered_apart else self._seen
                self._rows, self._offset, self._seen = raw.row, raw.offset, self._seen + 1
                if self._wanted(number):
                    yield self._document(self._at, raw)
            self._at, self._rows, self._offset, self._before = self._at + 1, 0, 0, self._seen

    def _in_blocks(self, seed: int) -> Iterator[Document | Unreadable]:
        # As many rows are read for a block of held-out documents as for one of the others.
        most = max(1, BLOCK // self.hold_out) if self.held_out else BLOCK
        if self._counted is None:
            self._counted = count(self.sources)
        strands = Strands(self.sources, self._counted, self._blocks.strands)
        rows = iter(strands)
        while True:
            self._blocks.strands = strands.places
            block: list[Document | Unreadable] = []
            characters = 0
            for at, number, raw in rows:
                if self._wanted(number):
                    block.append(self._document(at, raw))
                    characters += size_of(block[-1])
                    if len(block) == most or characters >= BLOCK_CHARACTERS:
                        break
            if not block:
                return
            if self.longest is not None:
                block = [part for one in block for part in parts_of(one, self.longest)]
            random.Random(f"{seed} {self.epoch} {self._blocks.block}").shuffle(block)
            while self._blocks.served < len(block):
                self._blocks.served += 1
                yield block[self._blocks.served - 1]
            self._blocks = Blocks(self._blocks.block + 1, 0, strands.places)

    def _document(self, at: int, raw: Raw) -> Document | Unreadable:
        value = raw.parse()
        if self._lacking is None and isinstance(value, Mapping):
            missing = next((name for name in self._wanted_columns if name not in value), None)
            if missing is not None:
                self._lacking, self._missing = value, missing
        return document_of(value, self.column, self.sources[at].name, raw.row, self.template)

    def _no_use(self, which: str) -> InputError:
        why = self.other_columns() or the_first(self._first)
        return InputError(f"{which} of {self.name} can be used: {by_reason(self.unused)}{why}")

    def _again(self) -> bool:
        """Begin another pass, if one was asked for."""
        if not self.repeat:
            return False
        self.epoch, self._at, self._rows, self._offset, self._seen, self._before = self.epoch + 1, 0, 0, 0, 0, 0
        self._blocks = Blocks()
        return True

    def _wanted(self, number: int) -> bool:
        """Whether a row, by its number in all sources, belongs to the sample, to this side of the hold-out, and to this
        share."""
        if self._drawn is not None:
            at = bisect_left(self._drawn, number)
            if at == len(self._drawn) or self._drawn[at] != number:
                return False
            number = at
        if self.hold_out:
            if (number % self.hold_out == 0) is not self.held_out:
                return False
            number = number // self.hold_out if self.held_out else number - number // self.hold_out - 1
        return number % self.world == self.rank

    def _draw(self, sample: int, seed: int) -> list[int] | None:
        """The numbers of the rows of the sample, in order."""
        if any(source.size is None and source.name.startswith("hub:") for source in self.sources):
            raise InputError("a streamed dataset has no known size to sample from; load it with datasets and pass it")
        if self.once:
            raise InputError("what can be read only once has no known size to sample from; make a list of it")
        total = sum(sum(1 for _ in source.read(0, 0)) for source in self.sources)
        return None if sample >= total else sorted(random.Random(seed).sample(range(total), sample))

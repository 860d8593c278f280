"""A shuffled order of sources that never lie in memory: read at many places at once, and permuted in blocks.

The rows of all sources are cut into up to `PLACES` strands. Each source of at most `PLACES` has strands of its own, as
many as its share of the rows asks for and at least one; of more sources one strand may run over several. The strands
give rows in turn, each as often as its length asks for: after any number of rows each has given its share of them,
give or take one row. So sources are mixed in proportion from the first row to the last, and a file whose subjects stand
one after the other is read at all of them at once. What comes next to each other is then decided by a permutation of
every `BLOCK` documents.

Rows of text files are counted first, by reading them once without parsing; those of tables are known. A zipped file
can't be entered in the middle and is one strand. Rows of a stream can't be counted: it is one strand, and beside a
stream sources take turns, one row each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

from .document import Document, Unreadable
from .read import Raw, Source

PLACES = 64
"""Places that a corpus is read at: as many files are open at once."""

BLOCK = 4096
"""Documents that are permuted together, unless their texts are longer than `BLOCK_CHARACTERS`."""

BLOCK_CHARACTERS = 2**26

MARKS = 1024  # places of a source that are kept while its rows are counted, from which strands may begin
END = 2**62  # the row after every row of a source


@dataclass
class Blocks:
    """How far shuffled reading has come in one pass.

    Attributes:
        block: the number of the present block.   served: how many of its documents were given.
        strands: where the strands were before it; None before the first.
    """

    block: int = 0
    served: int = 0
    strands: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True)
class Mark:
    """A place in a source: how many rows stand before it as they are numbered and as they are given, and its offset."""

    rows: int = 0
    offset: int = 0
    given: int = 0


Counts = Sequence[tuple[list[Mark], int]]


@dataclass(frozen=True)
class Strand:
    """A stretch of rows.

    Attributes:
        source: where it begins, the number of a source.   mark: the place in it.
        last: the source where it ends, and the number of its last row there.
        length: rows; where they can't be counted 1, so that strands take turns.
    """

    source: int
    mark: Mark
    last: tuple[int, int]
    length: int


class Strands:
    """All rows of some sources, strand by strand in turn.

    Args:
        counted: what `count` says of the sources.
        begun: where each strand goes on, as `places` told it; None begins all.

    Attributes:
        before: per source the number of its first row in all sources.
    """

    def __init__(
        self, sources: Sequence[Source], counted: Counts | None, begun: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.sources = sources
        self.strands = in_turns(sources) if counted is None else cut(counted)
        self.before = numbers_before(sources, None if counted is None else [rows for _, rows in counted])
        if begun is None:
            begun = [(one.source, one.mark.rows, one.mark.offset, one.mark.given, 0) for one in self.strands]
        self.now = [tuple(map(int, place)) for place in begun]

    @property
    def places(self) -> list[tuple[int, ...]]:
        """Per strand the source it is at, the rows before the next one, its offset, and how many it has given of this
        source and in all; plain data."""
        return list(self.now)

    def __iter__(self) -> Iterator[tuple[int, int, Raw]]:
        """Source, number in all sources, and row, from where each strand goes on."""
        readers = [self._read(i) for i in range(len(self.strands))]
        # A strand is due when its share of the rows is: half a row ahead, so that the longest begins.
        waiting = [((self.now[i][4] + 0.5) / one.length, i) for i, one in enumerate(self.strands)]
        heapify(waiting)
        while waiting:
            _, i = heappop(waiting)
            found = next(readers[i], None)
            if found is not None:
                yield found
                heappush(waiting, ((self.now[i][4] + 0.5) / self.strands[i].length, i))

    def _read(self, i: int) -> Iterator[tuple[int, int, Raw]]:
        at, rows, offset, given, taken = self.now[i]
        last = self.strands[i].last
        while at <= last[0]:
            for raw in self.sources[at].read(rows, offset):
                if (at, raw.row) > last:
                    return
                given, taken = given + 1, taken + 1
                self.now[i] = (at, raw.row, raw.offset, given, taken)
                yield at, self.before[at] + given - 1, raw
            at, rows, offset, given = at + 1, 0, 0, 0


def count(sources: Sequence[Source]) -> Counts | None:
    """Of each source places where a strand may begin and the number of rows; None where they can't be counted."""
    return [marks_of(source) for source in sources] if countable(sources) else None


def countable(sources: Sequence[Source]) -> bool:
    """Whether the rows of all sources can be counted."""
    return all(source.begin != "stream" for source in sources)


def numbers_before(sources: Sequence[Source], rows: Sequence[int] | None) -> list[int]:
    """Per source the number of its first row in all sources; where rows can't be counted, the number of the source, so
    that every `n`-th row of each is another one."""
    if rows is None:
        return list(range(len(sources)))
    return [sum(rows[:i]) for i in range(len(rows))]


def marks_of(source: Source) -> tuple[list[Mark], int]:
    """Places where a strand may begin, about evenly spaced, and the number of rows."""
    anywhere = source.begin == "anywhere"
    if source.rows is not None:
        every = max(1, source.rows // MARKS) if anywhere else source.rows + 1
        return [Mark(i, i, i) for i in range(0, source.rows, every)], source.rows
    marks, every, before, given = [Mark()], 1, Mark(), 0
    for raw in source.read(0, 0):
        if anywhere and given and given % every == 0:
            marks.append(before)
            if len(marks) == 2 * MARKS:
                marks, every = marks[::2], 2 * every
        given += 1
        before = Mark(raw.row, raw.offset, given)
    return (marks if given else []), given


def cut(counted: Counts) -> list[Strand]:
    """The strands of sources whose rows are counted."""
    total = sum(rows for _, rows in counted)
    full = [(i, marks, rows) for i, (marks, rows) in enumerate(counted) if rows]
    starts: list[tuple[int, int, Mark]] = []  # number in all sources, source, place
    done = 0
    for i, marks, rows in full:
        if len(full) <= PLACES:
            pieces = max(1, round(PLACES * rows / total))
            due = [rows * j / pieces for j in range(pieces)]
        else:
            due = [place for j in range(PLACES) if 0 <= (place := total * j / PLACES - done) < rows]
        starts += [(done + mark.given, i, mark) for mark in nearest(marks, due)]
        done += rows
    out = []
    ends = [*starts[1:], (total, len(counted), Mark())]
    for (number, i, mark), (after, j, end) in zip(starts, ends, strict=False):
        last = (j, end.rows) if j < len(counted) and end.rows else (j - 1, END)
        out.append(Strand(i, mark, last, after - number))
    return out


def nearest(marks: Sequence[Mark], places: Sequence[float]) -> list[Mark]:
    """The marks nearest to some numbers of rows, each once, in order."""
    found = {min(marks, key=lambda mark: abs(mark.given - place)) for place in places}
    return sorted(found, key=lambda mark: mark.given)


def in_turns(sources: Sequence[Source]) -> list[Strand]:
    """One strand of each source."""
    return [Strand(i, Mark(), (i, END), 1) for i in range(len(sources))]


def size_of(found: Document | Unreadable) -> int:
    """The characters of a document, about as many as it takes in memory."""
    if not isinstance(found, Document):
        return 0
    text: Any = found.text
    return len(text) if isinstance(text, str) else sum(len(str(message)) for message in text)

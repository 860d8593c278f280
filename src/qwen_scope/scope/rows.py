"""Documents as rows of tokens, a window at a time, and the place from where the next window is made."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qwen_scope.errors import InputError
from qwen_scope.text import NO_CHAT, PHASES, Chat, Chunk, Corpus, Document, Unreadable, chunks, meta_json, start_ids


@dataclass(frozen=True)
class State:
    """From where the next window is made: plain data.

    Attributes:
        cursor: of the corpus, before the document that is not whole yet.
        done: how many tokens of that document are in the store.
        documents, tokens: how many are in the store; the unfinished document counts.
        carried: per layer sum, count and last residual of the unfinished document.
        window: tokens of the next window, 0 where it is not said.
    """

    cursor: dict[str, int]
    done: int = 0
    documents: int = 0
    tokens: int = 0
    carried: dict[str, Any] = field(default_factory=dict)
    window: int = 0


@dataclass(frozen=True, eq=False)
class Row:
    """Consecutive tokens of one document, read by the model together.

    Attributes:
        lead: what the model reads before them and the store does not keep: a row that begins within a document begins
            with what the tokenizer puts before a text, such as a BOS.
        phases: of each token an index into `PHASES`, or None where the chat template tells no phases.
    """

    document: int
    start: int
    ids: list[int]
    texts: list[str]
    ends: bool
    lead: list[int]
    phases: list[int] | None = None


@dataclass(frozen=True, eq=False)
class Pieces:
    """What a window is made of, and the state after it (without carried residuals)."""

    rows: list[Row]
    documents: list[dict[str, Any]]
    spans: list[dict[str, Any]]
    unreadable: list[Unreadable]
    after: State

    @property
    def named(self) -> str:
        """Its documents in a few words, by their rows of the corpus."""
        if not self.documents:
            return f"a window of document {self.rows[0].document}" if self.rows else "rows that can't be read"
        first, last = (f"row {entry['row']} of {entry['source']}" for entry in (self.documents[0], self.documents[-1]))
        return first if first == last else f"{len(self.documents)} documents from {first} to {last}"

    def to_json(self) -> str:
        """As a text, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Pieces:
        """What `to_json` wrote."""
        data = json.loads(text)
        rows = [Row(**row) for row in data["rows"]]
        unreadable = [Unreadable(**one) for one in data["unreadable"]]
        return cls(rows, data["documents"], data["spans"], unreadable, State(**data["after"]))


class Reader:
    """Documents as rows of tokens, a window at a time.

    Args:
        need_phases: refuse a document whose phases can't be told, rather than read it without.

    Attributes:
        state: of the last window.   documents: begun so far.   unreadable: rows of this window that could not be used.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Any,
        state: State,
        row_tokens: int,
        max_tokens: int | None,
        chat: Chat | None,
        need_phases: bool = False,
    ) -> None:
        self.corpus, self.tokenizer, self.state = corpus, tokenizer, state
        self.row_tokens, self.max_tokens = row_tokens, max_tokens
        self.chat: Chat | None = chat
        self.lead, self.need_phases = start_ids(tokenizer), need_phases
        corpus.seek(state.cursor)
        self.stream = corpus.rows()
        self.tokens = state.tokens
        self.documents = state.documents - (state.done > 0)
        self.skip = state.done
        self.unreadable: list[Unreadable] = []
        # The document being cut into rows: the cursor before it, its rows not yet given out.
        self.before, self.waiting = state.cursor, iter(())

    def window(self, tokens: int, *, whole: bool = False) -> Pieces:
        """The next rows, until there are `tokens` of them.

        Args:
            whole: and until the last document ends.
        """
        rows: list[Row] = []
        entries: list[dict[str, Any]] = []
        spans: list[dict[str, Any]] = []
        self.unreadable = []
        held = 0
        while held < tokens or (whole and rows and not rows[-1].ends):
            row = next(self.waiting, None)
            if row is None:
                self.before = self.corpus.cursor()
                found = next(self.stream, None)
                if found is None:
                    break
                if isinstance(found, Document):
                    self._begin(found, entries, spans)
                else:
                    self.unreadable.append(found)
                continue
            rows.append(row)
            held += len(row.ids)
        self.tokens += held
        unfinished = bool(rows) and not rows[-1].ends
        after = State(
            cursor=self.before if unfinished else self.corpus.cursor(),
            done=rows[-1].start + len(rows[-1].ids) if unfinished else 0,
            documents=self.documents,
            tokens=self.tokens,
        )
        return Pieces(rows, entries, spans, list(self.unreadable), after)

    def _begin(self, document: Document, entries: list[dict[str, Any]], spans: list[dict[str, Any]]) -> None:
        """Tokenise a document, a chunk at a time: beside its text only what is kept of it is held, as numbers.

        Rows that are in the store already are not given out again.
        """
        try:
            made = self._tokenised(document)
        except InputError as error:
            unasked = self.chat is None and not isinstance(document.text, str)
            reason = NO_CHAT if unasked else "no tokens"
            self.unreadable.append(Unreadable(document.source, document.row, reason, str(error)[:500]))
            return
        ids, texts, total, phases = made.ids, made.texts, made.total, made.phases
        skip, self.skip = self.skip, 0
        if not skip:
            entries.append(
                {
                    "document": self.documents,
                    "tokens": len(ids),
                    "cut": total - len(ids),
                    "source": document.source,
                    "row": document.row,
                    "meta": meta_json(document.meta),
                }
            )
            spans += made.spans(self.documents)
        number, self.documents = self.documents, self.documents + 1
        starts = range(0, len(ids), self.row_tokens)
        self.waiting = (
            Row(
                number,
                s,
                ids[s : s + self.row_tokens].tolist(),
                texts[s : s + self.row_tokens],
                s + self.row_tokens >= len(ids),
                self.lead if s else [],
                None if phases is None else phases[s : s + self.row_tokens].tolist(),
            )
            for s in starts
            if s >= skip
        )

    def _tokenised(self, document: Document) -> Tokenised:
        """The tokens of a document, with their phases where they can be told.

        Raises:
            InputError: no tokens, or no phases where they are needed.
        """
        if self.chat is None:
            return Tokenised.of(chunks(self.tokenizer, document), self.max_tokens)
        try:
            return Tokenised.of(chunks(self.tokenizer, document, chat=self.chat, phases=True), self.max_tokens)
        except InputError:
            if self.need_phases:
                raise
            return Tokenised.of(chunks(self.tokenizer, document, chat=self.chat), self.max_tokens, told=False)


@dataclass(frozen=True, eq=False)
class Tokenised:
    """A document's tokens, cut to the length that is kept.

    Attributes:
        ids: `(tokens,)`.   texts: what each shows.   total: how many there were before the cut.
        turns, phases: of each token, or None where the chat template tells no phases.
        roles: by turn.
    """

    ids: array[int]
    texts: list[str]
    total: int
    turns: array[int] | None
    phases: array[int] | None
    roles: Mapping[int, str]

    @classmethod
    def of(cls, parts: Iterable[Chunk], most: int | None, *, told: bool = True) -> Tokenised:
        """The first `most` tokens of the chunks; those of a plain text are of the phase `text`."""
        ids, turns, phases, texts, total = array("i"), array("i"), array("b"), [], 0
        same: dict[str, str] = {}
        roles: Mapping[int, str] = {0: "text"}
        for part in parts:
            room = len(part.ids) if most is None else max(0, most - len(ids))
            ids.extend(part.ids[:room])
            # Most tokens of a long text show what others show.
            texts += [same.setdefault(text, text) for text in part.strings[:room]]
            total += len(part.ids)
            if part.turns is not None and part.phases is not None:
                turns.extend(part.turns[:room].tolist())
                phases.extend(part.phases[:room].tolist())
                roles = part.roles
        if told and not len(turns):
            turns, phases = array("i", bytes(4 * len(ids))), array("b", bytes(len(ids)))
        return cls(ids, texts, total, turns if told else None, phases if told else None, roles)

    def spans(self, document: int) -> list[dict[str, Any]]:
        """Rows of `spans`: neighbouring tokens of the same turn and phase."""
        if self.turns is None or self.phases is None:
            return []
        turns, phases = np.asarray(self.turns), np.asarray(self.phases)
        new = np.flatnonzero((np.diff(turns) != 0) | (np.diff(phases) != 0)) + 1
        begins, ends = [0, *new.tolist()], [*new.tolist(), len(turns)]
        return [
            {
                "document": document,
                "turn": int(turns[begin]),
                "role": self.roles[int(turns[begin])],
                "phase": PHASES[int(phases[begin])],
                "position": begin,
                "tokens": end - begin,
            }
            for begin, end in zip(begins, ends, strict=True)
        ]

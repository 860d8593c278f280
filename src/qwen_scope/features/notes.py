"""The record of features: labels, notes, verdicts and measurements, in a file of the store that is only added to."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

from qwen_scope.errors import (
    FormatError,
    InputError,
    MismatchError,
    NotFoundError,
    QwenScopeWarning,
    brief,
    check_count,
    foreign,
)
from qwen_scope.files import Fields, Remote, append_lines, read_lines, write_text
from qwen_scope.stats import Interval
from qwen_scope.store import FeatureStore

from .label_entry import SCORES, Label

FILE = "notes.jsonl"
SETTLED = 2_000_000_000  # nanoseconds; a file written just now may change again and keep its time and size
KINDS = ("label", "note", "verdict", "measure")
ON = "on"
"""Under which key a measurement says on which model's documents it was made."""


@dataclass(frozen=True)
class Note:
    """One entry of the file.

    Attributes:
        kind: `label`, `note`, `verdict` or `measure`.
        layer, feature: about which.
        fingerprint: of the SAE.
        body: a label's fields, `{"text"}` of a note, what `validate` found, or a measurement with its `name`.
        author: who wrote it.   made: when, in UTC.
    """

    kind: str
    layer: int
    feature: int
    fingerprint: str
    body: Mapping[str, Any]
    author: str = ""
    made: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="microseconds"))

    @property
    def id(self) -> str:
        """A digest of the entry: the same entry has the same id everywhere, which is how files are merged."""
        return hashlib.sha256(_line(asdict(self)).encode()).hexdigest()[:16]

    @property
    def label(self) -> Label:
        """The label of an entry of that kind."""
        return Label.from_json(self.body)

    def to_json(self) -> dict[str, Any]:
        """Plain values, id first."""
        return {"id": self.id, **asdict(self)}

    def to_line(self) -> str:
        """The entry as a line of its file."""
        return _line(self.to_json())

    @classmethod
    def from_json(cls, data: Any) -> Note:
        """The entry that `to_json` wrote.

        Raises:
            FormatError: it is not one.
        """
        one = Fields(data, "an entry", [f.name for f in fields(cls)], ["id"])
        kind, body = one.text("kind"), one.object("body")
        if kind not in KINDS:
            raise FormatError(f"an entry is one of {', '.join(KINDS)}, not {brief(kind)}")
        _check_body(kind, body)
        place = one.count("layer"), one.count("feature"), one.text("fingerprint")
        note = cls(kind, *place, body, one.text("author"), one.text("made"))
        if data.get("id", note.id) != note.id:
            raise FormatError(f"the entry {data['id']!r:.40} has been changed: its content has the id {note.id}")
        return note


def make_label(layer: int, feature: int, fingerprint: str, label: Label, author: str = "") -> Note:
    """A label as an entry."""
    return Note("label", layer, feature, fingerprint, label.to_json(), author or label.source)


@final
class Notes:
    """The labels, notes, verdicts and measurements of a store, in the order they were made.

    They are lines of JSON in `notes.jsonl` inside the store. An entry is never changed or taken away: a newer label
    stands beside an older one. Entries have ids made from their content, so joining two files loses and doubles
    nothing.

    Args:
        store: the store they belong to; entries about another SAE than its layers' are refused.

    Raises:
        FormatError: the file is damaged; the message says in which line.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store, self.path = store, store.folder / FILE
        self._entries = _entries_of(self.path)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Note]:
        return iter(self._entries.values())

    def of(self, layer: int, feature: int, kind: str | None = None) -> list[Note]:
        """The entries about one feature, oldest first."""
        return [
            note
            for note in self._entries.values()
            if (note.layer, note.feature) == (layer, feature) and kind in (None, note.kind)
        ]

    def label(self, layer: int, feature: int) -> Label | None:
        """The label to show; None if there is none. The best as `_worth` ranks them."""
        found = [note.label for note in self.of(layer, feature, "label")]
        return max(found, key=_worth, default=None)

    def labels(self) -> dict[tuple[int, int], Label]:
        """The label to show for every feature that has one, by layer and feature."""
        named = sorted({(n.layer, n.feature) for n in self._entries.values() if n.kind == "label"})
        return {place: label for place in named if (label := self.label(*place)) is not None}

    def add(self, *notes: Note) -> int:
        """Append entries to the file, all in one write, so that two writers don't mix lines; how many were new.

        Raises:
            MismatchError, NotFoundError: an entry about another SAE, or a feature the store does not have.
            InputError: the disk is full, or the file can't be written; then it is as it was before.
        """
        for note in notes:
            self._check(note)
        new = {note.id: note for note in notes if note.id not in self._entries}
        if new:
            append_lines(self.path, (note.to_line() for note in new.values()))
        self._entries |= new
        return len(new)

    def write(self, layer: int, feature: int, text: str, author: str = "") -> Note:
        """Add a note in plain words.

        Raises:
            InputError: an empty note.
        """
        if not text.strip():
            raise InputError("the note is empty")
        note = Note("note", layer, feature, self.store.layer(layer).fingerprint, {"text": text}, author)
        self.add(note)
        return note

    def verdict(self, layer: int, feature: int, found: Mapping[str, Any], author: str = "") -> Note:
        """Add what `validate` found (`Verdict.to_json()`)."""
        body = json.loads(json.dumps(found, default=str))
        note = Note("verdict", layer, feature, self.store.layer(layer).fingerprint, body, author)
        self.add(note)
        return note

    def measured(self, layer: int, feature: int) -> list[dict[str, Any]]:
        """The measurements of a feature on the documents of this store, the newest of each name.

        Another store's, which `merge` may have brought, are of other documents and left out.
        """
        found = {}
        for note in self.of(layer, feature, "measure"):
            if note.body.get(ON) == self._documents():
                found[note.body["name"]] = {key: value for key, value in note.body.items() if key != ON}
        return list(found.values())

    def known(self, layer: int, feature: int, name: str) -> dict[str, Any] | None:
        """The newest measurement of a feature by that name; None if there is none."""
        return next((one for one in self.measured(layer, feature) if one["name"] == name), None)

    def learn(self, layer: int, feature: int, name: str, found: Mapping[str, Any]) -> None:
        """Keep a measurement, unless it is known already; a warning tells of a store that can't be written."""
        body = {**json.loads(json.dumps(found, default=str)), "name": name}
        if self.known(layer, feature, name) == body:
            return
        body[ON] = self._documents()
        try:
            self.add(Note("measure", layer, feature, self.store.layer(layer).fingerprint, body, "qwen-scope"))
        except InputError as error:
            warnings.warn(f"what was measured is not kept: {error}", QwenScopeWarning, stacklevel=2)

    def _documents(self) -> list[Any]:
        manifest = self.store.manifest
        return [manifest.model, manifest.documents, manifest.tokens]

    def export(self, path: str | os.PathLike[str]) -> int:
        """Write every entry to a file of its own; how many.

        Raises:
            InputError: it exists.
        """
        if Path(path).is_file():
            raise InputError(f"can't write {path}: it exists; name a new file")
        write_text(path, "".join(note.to_line() + "\n" for note in self._entries.values()))
        return len(self._entries)

    def merge(self, path: str | os.PathLike[str]) -> int:
        """Add the entries of an exported file that are not here yet; how many.

        Raises:
            NotFoundError: there is no such file.   FormatError: it is damaged.
            MismatchError: it holds entries about another SAE; then nothing is added.
        """
        place = Path(path)
        if not place.is_file():
            raise NotFoundError(f"there are no notes in {path}: {os.strerror(errno.ENOENT)}")
        # Nobody is adding to an exported file: a torn last line in it means that it is not all there.
        with foreign(f"{path} can't be read"):
            lines = place.read_bytes().decode("utf-8").split("\n")
        return self.add(*_parsed(place, [line for line in lines if line.strip()]))

    def search(self, words: str, n: int | None = 20) -> list[Note]:
        """Labels and notes that hold every word (a prefix of a word is enough), best match first.

        A match counts more the rarer the word is among all entries, and less the longer the text is.
        """
        if n is not None:
            check_count("n", n)
        wanted = _words(words)
        if not wanted:
            raise InputError("search for at least one word")
        texts = {note.id: _words(str(note.body.get("text", ""))) for note in self._entries.values()}
        hits = {
            word: {id for id, found in texts.items() if any(one.startswith(word) for one in found)} for word in wanted
        }
        both = set.intersection(*hits.values())
        weight = sum(math.log(1 + len(texts) / max(1, len(found))) for found in hits.values())
        ranked = sorted(both, key=lambda id: (-weight / len(texts[id]) ** 0.5, list(self._entries).index(id)))
        return [self._entries[id] for id in ranked[:n]]

    def _check(self, note: Note) -> None:
        self.store.check_feature(note.layer, note.feature)
        if note.fingerprint != self.store.layer(note.layer).fingerprint:
            raise MismatchError(
                f"the {note.kind} on layer {note.layer}, feature {note.feature} is about another SAE"
                f" ({note.fingerprint[:12]}) than the store {self.store.folder}"
            )


def read_notes(path: Path | Remote) -> list[Note]:
    """The entries of a store's file, none where there is no file.

    A last line that was cut off when its writer died is left out, with a warning.

    Raises:
        FormatError: a line is not an entry.
    """
    return _parsed(path, read_lines(path))


def labels_from(path: str | os.PathLike[str]) -> Mapping[tuple[str, int], Label]:
    """The labels to show of a store, or of a file that `label --export` wrote, by fingerprint of the SAE and feature.

    Of several of one feature the one that `Notes.label` shows.

    Raises:
        NotFoundError: there is no such store or file.   FormatError: it is damaged.
    """
    place = Path(path)
    file = place / FILE if place.is_dir() else place
    if not file.is_file():
        raise NotFoundError(f"there are no labels in {path}; qwen-scope label STORE writes some, and --export a file")
    found = file.stat()
    if time.time_ns() - found.st_mtime_ns < SETTLED:
        return _shown(read_notes(file))
    return _settled_labels(file, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)
def _settled_labels(path: Path, written: int, size: int) -> Mapping[tuple[str, int], Label]:
    """The labels to show of a file of this age and size, which every page of a feature asks for."""
    return MappingProxyType(_shown(read_notes(path)))


def _shown(notes: Iterable[Note]) -> dict[tuple[str, int], Label]:
    """By fingerprint of the SAE and feature, of several labels the one to show."""
    found: dict[tuple[str, int], list[Label]] = {}
    for note in notes:
        if note.kind == "label":
            found.setdefault((note.fingerprint, note.feature), []).append(note.label)
    return {place: max(some, key=_worth) for place, some in found.items()}


def _worth(label: Label) -> tuple[bool, bool, float]:
    """One above chance comes before one at chance, one of a model before a summary, then the better score counts."""
    return not label.at_chance, label.by_model, label.score


def _parsed(path: Path | Remote, lines: list[str]) -> list[Note]:
    out = []
    for number, line in enumerate(lines, 1):
        try:
            out.append(Note.from_json(json.loads(line)))
        except (ValueError, RecursionError, FormatError) as error:
            raise FormatError(f"line {number} of {path} is no entry: {str(error)[:200]}") from error
    return out


def _entries_of(path: Path | Remote) -> dict[str, Note]:
    """The entries by id, none where there is no file. Parsed once while the file stays the same."""
    if isinstance(path, Remote):
        return {note.id: note for note in read_notes(path)}
    try:
        found = path.stat()
    except OSError:
        return {}
    if time.time_ns() - found.st_mtime_ns < SETTLED:
        return {note.id: note for note in read_notes(path)}
    return dict(_settled_entries(path, found.st_mtime_ns, found.st_size))


@lru_cache(maxsize=4)
def _settled_entries(path: Path, written: int, size: int) -> Mapping[str, Note]:
    """The entries of a file of this age and size."""
    return {note.id: note for note in read_notes(path)}


def _check_body(kind: str, body: Mapping[str, Any]) -> None:
    """Refuse a label without its scores, a note without text and a verdict without its outcome."""
    if kind in ("verdict", "measure"):
        Fields(body, f"a {kind}").text("outcome" if kind == "verdict" else "name")
        return
    wanted = [f.name for f in fields(Label) if f.name != "random"] if kind == "label" else ["text"]
    one = Fields(body, f"a {kind}", wanted, ["random"] if kind == "label" else [])
    for name in set(body) - set(SCORES):
        one.text(name)
    for name in set(body) & set(SCORES):
        if name == "random" and body[name] is None:  # not measured
            continue
        score = Fields(body[name], f"{name} of a label", [f.name for f in fields(Interval)])
        for end in ("estimate", "low", "high", "level"):
            score.number(end, 0, 1)
        score.count("n", 1)
        if body[name]["low"] > body[name]["high"]:
            raise FormatError(f"{score.what} has an interval that ends below its beginning")


def _line(data: Mapping[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=True, sort_keys=True, separators=(",", ":"), allow_nan=True)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())

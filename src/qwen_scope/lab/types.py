"""The values the lab hands out, and the names its factors may take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qwen_scope.errors import NotFoundError, nearest

LANGUAGES = ("zh", "ja", "ko", "ru", "ar", "en", "fr", "de", "es")
REGISTERS = ("plain", "polite", "rude", "archaic")
KINDS = ("talk", "chat", "arithmetic", "code", "prose", "neutral", "drift", "repetition")
SPLITS = ("train", "heldout_sentences", "heldout_templates", "heldout_combinations")


@dataclass(frozen=True)
class Span:
    """A stretch `text[start:end]` of a document and the factors that made it."""

    start: int
    end: int
    factors: Mapping[str, str]


@dataclass(frozen=True)
class Document:
    """One text of the corpus with everything that is known about it."""

    id: str
    text: str
    kind: str
    language: str | None
    register: str | None
    split: str
    factors: Mapping[str, str] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """The beginning of a text, to be continued by a model; `expected` is the exact result where there is one."""

    text: str
    kind: str
    language: str | None
    register: str | None
    factors: Mapping[str, str] = field(default_factory=dict)
    expected: int | None = None


@dataclass(frozen=True)
class ParallelGroup:
    """One filled meaning in one register: per language the sentence, and the split that its filling belongs to."""

    id: str
    meaning: str
    register: str
    slots: Mapping[str, str]
    sentences: Mapping[str, str]
    splits: Mapping[str, str]


def check_names(what: str, names: Iterable[str] | None, known: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple, or all known ones for `None`; raises `NotFoundError` on one that does not exist."""
    known = tuple(known)
    if names is None:
        return known
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in known:
            raise NotFoundError(f"there is no {what} {name!r}; {nearest(str(name), known)}")
    if not names:
        raise NotFoundError(f"no {what} was named; known are {', '.join(known)}")
    return names

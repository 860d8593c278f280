"""One language of the grammar: its lexicon, templates, frames and chat phrases, read from `languages/xx.toml`.

A template is text with fields: `{food}` writes the citation form, `{food.acc}` a named form, `{colour@object}` the
form named by the object's gender, `{person?er|sie}` the choice that the person's gender makes.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from qwen_scope.errors import FormatError

from .types import LANGUAGES, REGISTERS, check_names

Entry = Mapping[str, str]
NUMBERS = tuple(str(n) for n in (*range(11, 21), *range(25, 31), *range(35, 41)))
GENDERS = {"m": 0, "f": 1, "n": 2}
SLOT_LEXICON = {"other": "person", "topic": ""}
_FIELD = re.compile(r"\{(\w+)(?:\.(\w+)|@(\w+)|\?([^}]*))?\}")
_CASED = frozenset({"en", "fr", "de", "es", "ru"})
_SENTENCE_START = re.compile(r"(^|[.!?]\s+)([¿¡']*)(\w)")
# German alone begins with a capital behind a colon.
_SENTENCE_START_DE = re.compile(r"(^|[.!?:]\s+)([¿¡']*)(\w)")
_PARTICLES = re.compile(r"(.)(은/는|이/가|을/를|이나/나|으로/로|이야/야|이라니까/라니까|이로다/로다)")
_DIGITS_WITH_FINAL = "013678"


@dataclass(frozen=True)
class Field:
    """A place in a template that an entry fills."""

    slot: str
    form: str
    agree: str
    options: tuple[str, ...]

    def write(self, entries: Mapping[str, Entry]) -> str:
        """The text of this field under the given entries."""
        entry = entries[self.slot]
        if self.options:
            chosen = GENDERS[entry["g"]]
            return self.options[chosen if chosen < len(self.options) else 0]
        if self.agree:
            return entry.get(entries[self.agree]["g"], entry["cite"])
        return entry.get(self.form, entry["cite"])


@dataclass(frozen=True)
class Template:
    """One way to say one meaning in one register of one language."""

    id: str
    language: str
    register: str
    meaning: str
    framed: bool
    parts: tuple[str | Field, ...]
    slots: tuple[str, ...]

    def write(self, entries: Mapping[str, Entry]) -> str:
        """The template filled with entries, before frame, capitals and particles."""
        return "".join(part if isinstance(part, str) else part.write(entries) for part in self.parts)


@dataclass(frozen=True)
class Language:
    """All that the grammar knows about one language."""

    code: str
    lexicon: Mapping[str, Mapping[str, Entry]]
    templates: Mapping[str, tuple[Template, ...]]
    openers: Mapping[str, tuple[str, ...]]
    closers: Mapping[str, tuple[str, ...]]
    phrases: Mapping[str, tuple[Template, ...]]
    names: Mapping[str, str]

    @property
    def space(self) -> str:
        """What stands between two sentences."""
        return "" if self.code in ("zh", "ja") else " "

    def finish(self, text: str) -> str:
        """The text with capitals at sentence starts and, in Korean, settled particles."""
        if self.code in _CASED:
            start = _SENTENCE_START_DE if self.code == "de" else _SENTENCE_START
            return start.sub(lambda m: m[1] + m[2] + m[3].upper(), text)
        return _PARTICLES.sub(_particle, text) if self.code == "ko" else text


def _particle(match: re.Match[str]) -> str:
    before, pair = match[1], match[2]
    closed, opened = pair.split("/")
    final = (ord(before) - 0xAC00) % 28 if "가" <= before <= "힣" else int(before in _DIGITS_WITH_FINAL)
    # The particle 으로 treats a final ㄹ like a vowel.
    if closed == "으로" and (final == 8 or before in "178"):
        final = 0
    return before + (closed if final else opened)


def parse(text: str) -> tuple[tuple[str | Field, ...], tuple[str, ...]]:
    """The parts of a template and the slots it needs, in order of appearance."""
    parts: list[str | Field] = []
    slots: dict[str, None] = {}
    at = 0
    for match in _FIELD.finditer(text):
        if match.start() > at:
            parts.append(text[at : match.start()])
        slot, form, agree, options = match.groups()
        parts.append(Field(slot, form or "cite", agree or "", tuple(options.split("|")) if options else ()))
        slots[slot] = None
        if agree:
            slots[agree] = None
        at = match.end()
    if at < len(text):
        parts.append(text[at:])
    return tuple(parts), tuple(slots)


def _template(code: str, register: str, meaning: str, text: str, framed: bool) -> Template:
    parts, slots = parse(text)
    return Template(f"{code}.{register}.{meaning}", code, register, meaning, framed, parts, slots)


def _lexicon(
    data: Mapping[str, Mapping[str, str]], columns: Mapping[str, str], code: str
) -> dict[str, dict[str, Entry]]:
    lexicon: dict[str, dict[str, Entry]] = {"number": {n: {"cite": n} for n in NUMBERS}}
    for slot, entries in data.items():
        forms = columns[slot].split()
        lexicon[slot] = {}
        for key, text in entries.items():
            values = text.split("|")
            if len(values) != len(forms):
                raise FormatError(
                    f"languages/{code}.toml: {slot}.{key} has {len(values)} forms, its columns name {len(forms)}"
                )
            lexicon[slot][key] = dict(zip(forms, values, strict=True))
    return lexicon


@cache
def load(code: str) -> Language:
    """The language with this code; raises `NotFoundError` for one the lab does not speak."""
    check_names("language", code, LANGUAGES)
    raw = (resources.files("qwen_scope.lab") / "languages" / f"{code}.toml").read_text(encoding="utf-8")
    data = tomllib.loads(raw)
    templates: dict[str, list[Template]] = {register: [] for register in REGISTERS}
    for register in REGISTERS:
        for meaning, lines in data["core"].items():
            templates[register].append(_template(code, register, meaning, lines.get(register, lines["plain"]), True))
        for meaning, lines in data["address"].items():
            templates[register].append(_template(code, register, meaning, lines[register], False))
    phrases: dict[str, tuple[Template, ...]] = {}
    for name, value in data["chat"].items():
        for register in REGISTERS:
            texts = value[register] if isinstance(value, dict) else value
            phrases[f"{name}.{register}"] = tuple(
                _template(code, register, f"{name}{i}", text, False) for i, text in enumerate(texts)
            )
    return Language(
        code=code,
        lexicon=_lexicon(data["lexicon"], data["columns"], code),
        templates={register: tuple(found) for register, found in templates.items()},
        openers={register: tuple(data["frames"][register]["openers"]) for register in REGISTERS},
        closers={register: tuple(data["frames"][register]["closers"]) for register in REGISTERS},
        phrases=phrases,
        names=data["names"],
    )

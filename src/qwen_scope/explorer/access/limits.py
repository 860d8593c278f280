"""`Limits`: what one visitor may ask for, all of it; nothing else on the page bounds a request."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_scope.errors import InputError, brief, check_count, nearest

LARGEST = 2**53
"""Of a whole number in a field: up to here JSON, JavaScript and floats agree on it."""


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for; the operator sets each with `--limit NAME=NUMBER`.

    Attributes:
        characters: of a text, a prompt or a note.
        set_texts: texts of one side of a comparison.
        set_tokens: tokens of all texts of a comparison together.
        set_bytes: memory of the activations of a comparison, the padding of shorter texts included.
        features: features in a ranking.
        interventions: at once.
        new_tokens: of a generation.
        sweep_prompts: prompts of a sweep.
        sweep_tokens: new tokens of a sweep at one amount, all prompts together.
        graph_tokens: of a prompt that a graph is made of.
        graph_nodes: features in a graph.
        pattern_seconds: what all searches of a sweep for a regular expression may take.
        recipe_bytes: of a recipe's file.
        upload_bytes: of any file.
        request_bytes: of a request that is no upload.
        waiting: requests of one address that wait at once.
        sessions: browsers whose state is kept; the one that was seen least lately loses its own.
        remembered_bytes: of activations kept for all visitors together.
    """

    characters: int = 20_000
    set_texts: int = 500
    set_tokens: int = 100_000
    set_bytes: int = 500_000_000
    features: int = 100
    interventions: int = 20
    new_tokens: int = 300
    sweep_prompts: int = 32
    sweep_tokens: int = 2_000
    graph_tokens: int = 256
    graph_nodes: int = 300
    pattern_seconds: int = 1
    recipe_bytes: int = 30_000
    upload_bytes: int = 2_000_000
    request_bytes: int = 2_000_000
    waiting: int = 60
    sessions: int = 100
    remembered_bytes: int = 128_000_000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_count(f"the limit {field.name}", getattr(self, field.name))

    @classmethod
    def of(cls, given: Iterable[str]) -> Limits:
        """From texts such as `new_tokens=1000`.

        Raises:
            InputError: no such limit, or no whole number from 1 up.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        chosen: dict[str, int] = {}
        for text in given:
            name, equals, value = text.partition("=")
            if not equals:
                raise InputError(f"a limit is written NAME=NUMBER, such as new_tokens=1000, not {brief(text)}")
            if name not in known:
                raise InputError(f"there is no limit {brief(name)}; {nearest(name[:60], known)}")
            if name in chosen:
                raise InputError(f"the limit {name} is given twice")
            chosen[name] = whole_number(value, f"limit {name}")
        return cls(**chosen)

    def check_text(self, text: object, what: str = "text") -> str:
        """The text, if it is one that may be read.

        Raises:
            InputError: it is none, empty or too long.
        """
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"the {what} is empty; write or paste one")
        if len(text) > self.characters:
            raise InputError(
                f"the {what} has {len(text):,} characters and this page reads up to {self.characters:,};"
                " shorten it, or use qwen-scope extract for a corpus"
            )
        return text

    def check_texts(self, texts: object, what: str, most: int) -> list[str]:
        """A list of texts that may be read, up to a maximum number.

        Raises:
            InputError: it is none, or one of its texts can't be read.
        """
        return [self.check_text(text, f"{what} {i + 1}") for i, text in enumerate(listed(texts, f"{what}s", most))]

    def check_features(self, n: object) -> int:
        """The length of a ranking."""
        return check_count("the number of features", whole_number(n, "number of features"), 1, self.features)

    def check_rows(self, rows: object) -> list[Mapping[str, Any]]:
        """A list of interventions as objects with keys, up to a maximum number."""
        found = listed(rows, "interventions", self.interventions)
        for row in found:
            if not isinstance(row, Mapping):
                raise InputError(f"an intervention is an object with keys such as layer and feature, not {brief(row)}")
        return found


def listed(values: object, what: str, most: int) -> list[Any]:
    """A list up to a maximum length; raises InputError for anything else."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise InputError(f"give the {what} as a list, not {brief(values)}")
    if len(values) > most:
        raise InputError(f"these are {len(values):,} {what} and this page takes up to {most:,} at a time")
    return list(values)


def one_of(value: object, known: Iterable[str], what: str) -> str:
    """One of the known names; raises InputError for anything else."""
    names = list(known)
    if not isinstance(value, str) or value not in names:
        raise InputError(f"{what} is one of {', '.join(names)}, not {brief(value)}")
    return value


def whole_number(value: object, what: str) -> int:
    """A whole number from a field of the page.

    Raises:
        InputError: it is empty, something else, or larger than 2^53 either way.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InputError(f"give the {what} as a whole number")
    try:
        number = float(value) if isinstance(value, float | str) else value
        whole = int(number)
    except (ValueError, OverflowError):
        raise InputError(f"the {what} must be a whole number; got {brief(value)}") from None
    if whole != number or abs(whole) > LARGEST:
        raise InputError(f"the {what} must be a whole number; got {brief(value)}")
    return whole

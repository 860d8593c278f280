"""JSON that people and other programs hand in, read with exact types: a boolean is no number, NaN no amount."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, final

from qwen_scope.errors import FormatError, NotFoundError, brief, check_count, check_number, foreign, nearest

from .bounded import first_bytes, parse_value
from .remote import Remote, place

T = TypeVar("T")


@final
class Fields:
    """A JSON object, read key by key. Every refusal is a `FormatError` that says what was read and which key.

    Args:
        value: what the parser gave.
        what: what an error calls it, such as "a feature of rude.json".
        keys: the keys it has, no more and no fewer; None for any.
        optional: of further keys that it may have.

    Raises:
        FormatError: it is no object, or a key is missing or unknown.
    """

    def __init__(self, value: Any, what: str, keys: Iterable[str] | None = None, optional: Iterable[str] = ()) -> None:
        if not isinstance(value, Mapping):
            raise FormatError(f"{what} is an object with keys, not {brief(value)}")
        self.data, self.what = value, what
        if keys is None:
            return
        needed = list(keys)
        known = {*needed, *optional}
        if missing := [key for key in needed if key not in value]:
            raise FormatError(f"{what} lacks {missing[0]!r}; it has the keys {', '.join(needed)}")
        if unknown := [key for key in value if key not in known]:
            raise FormatError(f"{what} has no key {brief(unknown[0])}; {nearest(str(unknown[0])[:60], known)}")

    def __getitem__(self, key: str) -> Any:
        """The value as it is."""
        if key not in self.data:
            raise FormatError(f"{self.what} lacks {key!r}")
        return self.data[key]

    def maybe(self, read: Callable[[str], T], key: str) -> T | None:
        """What `read` makes of a key, or None where it is missing or null."""
        return None if self.data.get(key) is None else read(key)

    def text(self, key: str) -> str:
        """A string."""
        return self._of(key, str, "a text")

    def flag(self, key: str) -> bool:
        """`true` or `false`."""
        return self._of(key, bool, "true or false")

    def items(self, key: str) -> list[Any]:
        """A list of anything."""
        return self._of(key, list, "a list")

    def object(self, key: str) -> dict[str, Any]:
        """An object of anything."""
        return dict(self._of(key, Mapping, "an object with keys"))

    def count(self, key: str, least: int = 0, most: int = 2**63 - 1) -> int:
        """A whole number in a range; 5.0 is none, nor is `true`."""
        return check_count(self._name(key), self[key], least, most, kind=FormatError)

    def number(self, key: str, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number in a range."""
        return check_number(self._name(key), self[key], least, most, kind=FormatError)

    def counts(self, key: str, least: int = 0, most: int = 2**63 - 1) -> tuple[int, ...]:
        """A list of whole numbers."""
        name = f"an entry of {self._name(key)}"
        return tuple(check_count(name, one, least, most, kind=FormatError) for one in self.items(key))

    def numbers(self, key: str, least: float = -math.inf, most: float = math.inf) -> tuple[float, ...]:
        """A list of finite numbers."""
        name = f"an entry of {self._name(key)}"
        return tuple(check_number(name, one, least, most, kind=FormatError) for one in self.items(key))

    def header(self, version: int, format: str | None = None) -> None:
        """Refuse another format or version than this package reads.

        Raises:
            FormatError: the key `format` holds another name, or `version` another number; `true` is not 1.
        """
        if format is not None and self.data.get("format") != format:
            raise FormatError(f"{self.what} does not say it is of the format {format!r}")
        found = self.data.get("version")
        if type(found) is not int or found != version:
            raise FormatError(f"{self.what} is of version {brief(found)}; this package reads version {version}")

    def _name(self, key: str) -> str:
        return f"{key!r} of {self.what}"

    def _of(self, key: str, kind: Any, fits: str) -> Any:
        if not isinstance(self[key], kind):
            raise FormatError(f"{self._name(key)} is {fits}, not {brief(self[key])}")
        return self[key]


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """The JSON object in a text.

    Raises:
        FormatError: as `parse_value`, or it is no object.
    """
    data = parse_value(text, what)
    if not isinstance(data, dict):
        raise FormatError(f"{what} holds no JSON object but {brief(data)}")
    return data


def read_object(path: str | os.PathLike[str] | Remote, hint: str = "") -> dict[str, Any]:
    """The JSON object in a file, of this machine or at a URI.

    Args:
        hint: what to do where there is no such file; the end of the sentence.

    Raises:
        NotFoundError: there is no such file.   FormatError: as `parse_object`, or it can't be read.
    """
    file = place(path)
    with foreign(f"{path} can't be read"):
        if not file.exists():
            raise NotFoundError(f"there is no file {str(path)!r}" + (f"; {hint}" if hint else ""))
        data = first_bytes(file)
    return parse_object(data, str(path))

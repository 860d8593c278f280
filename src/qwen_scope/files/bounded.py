"""JSON and YAML from outside, with bounds: a short file cannot cost much memory or time, nor mean two things."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from typing import Any, Literal

from qwen_scope.errors import FormatError, brief, foreign

CHARACTERS = 64 * 10**6
"""Of a text."""

VALUES = {"JSON": 4 * 10**6, "YAML": 400_000}
"""Values in a text: what its commas, brackets and lines can make; a value of YAML costs ten times as much."""

DEPTH = 64
"""Lists and objects inside each other."""

DIGITS = 40
"""Of a whole number; Python itself refuses 4,301 and takes quadratic time for less."""

Form = Literal["JSON", "YAML"]


def parse_value(text: str | bytes, what: str, form: Form = "JSON") -> Any:
    """The value that a text of JSON or YAML holds: objects, lists, texts, numbers, truth values and null.

    YAML has to say plainly what JSON can: anchors and aliases, tags, merge keys, dates and numbers to other bases than
    ten are refused.

    Args:
        what: what an error calls it, such as a file's name.

    Raises:
        FormatError: it is no text of that form, exceeds one of the bounds of this module, or an object in it names a
            key twice.
    """
    with foreign(f"{what} is not {form}"):
        if isinstance(text, bytes):
            text = text.decode("utf-8")
    if len(text) > CHARACTERS:
        raise FormatError(f"{what} is too large: {len(text):,} characters, of which {CHARACTERS:,} are read")
    return _json(text, what) if form == "JSON" else _yaml(text, what)


def first_bytes(path: Any) -> bytes:
    """The bytes of a file, or of one without end more than `parse_value` takes.

    Args:
        path: a `Path`, or a `Remote`.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        return file.read(4 * CHARACTERS + 1)  # a character has at most four bytes


def _json(text: str, what: str) -> Any:
    # Each value but the first follows one of these characters; counting them costs nothing beside parsing.
    _check_values(1 + sum(text.count(mark) for mark in ",:[{"), what, "JSON")

    def whole(digits: str) -> int:
        return int(_check_digits(digits, what))

    with foreign(f"{what} is not JSON"):
        data = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, what), parse_int=whole)
    _check_depth(data, what)
    return data


def _yaml(text: str, what: str) -> Any:
    from yaml import AliasEvent, CollectionEndEvent, CollectionStartEvent, MarkedYAMLError, ScalarEvent, load, parse

    loader = _loader(what)
    values = depth = 0
    with foreign(f"{what} is not YAML"):
        try:
            for event in parse(text, Loader=loader):
                if isinstance(event, AliasEvent) or getattr(event, "anchor", None) is not None:
                    raise FormatError(
                        f"{what} uses an anchor or alias (& or *), which is not read; write the value out"
                    )
                if getattr(event, "tag", None) is not None:
                    raise FormatError(f"{what} uses a tag, {brief(event.tag)}, which is not read; leave it out")
                values += isinstance(event, ScalarEvent | CollectionStartEvent)
                depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
                _check_values(values, what, "YAML")
                if depth > DEPTH:
                    raise _too_deep(what)
            return load(text, Loader=loader)
        except MarkedYAMLError as error:
            where = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"
            raise FormatError(f"{what} is not YAML: {error.problem or error.context}{where}") from error


def _loader(what: str) -> type:
    """YAML's safe loader, in C where it was built so, with strict objects and numbers."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Strict(base):  # PyYAML's way to say how values are made is a class
        def strict_map(self, node: Any) -> dict[str, Any]:
            pairs = []
            for key_node, value_node in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    raise FormatError(f"{what} has the key {brief(key)}, which is no text; put it into quotes")
                pairs.append((key, self.construct_object(value_node, deep=True)))
            return _once(pairs, what)

        def strict_list(self, node: Any) -> list[Any]:
            return [self.construct_object(one, deep=True) for one in node.value]

        def strict_int(self, node: Any) -> int:
            if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", node.value):
                raise FormatError(
                    f"{what} writes the number {brief(node.value)}; write it with plain digits, or put it into quotes"
                )
            return int(_check_digits(node.value, what))

        def strict_float(self, node: Any) -> float:
            if ":" in node.value:
                raise FormatError(f"{what} holds {brief(node.value)}, a number to base 60; put it into quotes")
            return self.construct_yaml_float(node)

        def refuse(self, node: Any) -> Any:
            kind = "a date" if node.tag.endswith("timestamp") else "which is not read"
            raise FormatError(f"{what} holds {brief(node.value)}, {kind}; put it into quotes")

    for kind, make in (
        ("map", Strict.strict_map), ("seq", Strict.strict_list), ("int", Strict.strict_int),
        ("float", Strict.strict_float), ("timestamp", Strict.refuse), ("merge", Strict.refuse),
        ("value", Strict.refuse),
    ):  # fmt: skip
        Strict.add_constructor(f"tag:yaml.org,2002:{kind}", make)
    return Strict


def _once(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    """An object's keys, each once: of two values the reader would have to guess which was meant."""
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[Hashable] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise FormatError(f"{what} names the key {brief(twice)} twice")
    return out


def _check_values(values: int, what: str, form: Form) -> None:
    if values > VALUES[form]:
        raise FormatError(f"{what} is too large: it holds more than {VALUES[form]:,} values")


def _check_digits(digits: str, what: str) -> str:
    if len(digits) > DIGITS:
        raise FormatError(f"{what} holds a whole number of {len(digits):,} digits; up to {DIGITS} are read")
    return digits


def _check_depth(data: Any, what: str) -> None:
    """Refuse lists and objects more than `DEPTH` inside each other, level by level and without recursion."""
    level = [data]
    for _ in range(DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_deep(what)


def _too_deep(what: str) -> FormatError:
    return FormatError(f"{what} is nested too deeply: more than {DEPTH} lists and objects inside each other")

"""A feature's name: `LAYER/FEATURE`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen_scope.errors import InputError, brief

MOST = 10**6  # numbers that a list such as 0,2-5 may stand for

_NAME = re.compile(r"([0-9]{1,6})\s*/\s*([0-9]{1,9})")
_PART = re.compile(r"(?:([0-9]{1,6})\s*/)?(.*)", re.DOTALL)
_NUMBERS = re.compile(r"\s*([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?\s*")


def parse_feature(text: str) -> tuple[int, int]:
    """Layer and feature of a name such as `5/678`.

    Raises:
        InputError: anything else.
    """
    match = _NAME.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise InputError(f"a feature is named LAYER/FEATURE, such as 5/678, not {brief(text)}")
    return int(match[1]), int(match[2])


def parse_features(text: str) -> list[tuple[int | None, int]]:
    """Layer and feature of each name in a list such as `5/678,5/40-50`, in ascending order, each once.

    A number or range without its layer has None in its place.

    Raises:
        InputError: anything else, or a range that runs backwards or is longer than `MOST`.
    """
    found: set[tuple[int | None, int]] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None or (numbers := numbers_in(match[2])) is None:
            raise InputError(
                f"features are named LAYER/FEATURE, such as 5/678 or 5/3,5/40-50, not {brief(part.strip())}"
            )
        found.update((None if match[1] is None else int(match[1]), number) for number in numbers)
    return sorted(found, key=lambda place: (-1 if place[0] is None else place[0], place[1]))


def features_at(text: str, layers: Sequence[int], layer: int | None = None) -> list[tuple[int, int]]:
    """Layer and feature of each name in a list, as `parse_features` reads it.

    Args:
        layers: there are; where there is one alone, it is that of numbers without a layer.
        layer: of numbers without one.

    Raises:
        InputError: as `parse_features`, a number without a layer where there are several, or names of other layers
            than `layer`.
    """
    usual = layer if layer is not None or len(layers) != 1 else layers[0]
    found = []
    for named, feature in parse_features(text):
        if named is None and usual is None:
            there = ", ".join(map(str, layers))
            raise InputError(f"there are layers {there}; name features LAYER/FEATURE, such as {layers[0]}/{feature}")
        if named is not None and layer is not None and named != layer:
            raise InputError(f"{named}/{feature} is not of layer {layer}; leave the layer {layer} out")
        found.append((usual if named is None else named, feature))
    return sorted(set(found))


def numbers_in(part: str) -> range | None:
    """The numbers of `3` or `2-5`, or None where it is neither.

    Raises:
        InputError: a range that runs backwards, or of more than `MOST` numbers.
    """
    match = _NUMBERS.fullmatch(part)
    if match is None:
        return None
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise InputError(f"the range {part.strip()!r} runs backwards; write {last}-{first}")
    if last - first >= MOST:
        raise InputError(f"the range {part.strip()!r} has more than {MOST:,} numbers")
    return range(first, last + 1)


def feature_name(layer: int, feature: int) -> str:
    """`5/678`, as `parse_feature` reads it."""
    return f"{layer}/{feature}"

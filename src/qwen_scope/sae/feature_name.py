"""A feature's name: `LAYER/FEATURE`."""

from __future__ import annotations

import re

from qwen_scope.errors import InputError, brief

_NAME = re.compile(r"([0-9]{1,6})\s*/\s*([0-9]{1,9})")


def parse_feature(text: str) -> tuple[int, int]:
    """Layer and feature of a name such as `5/678`.

    Raises:
        InputError: anything else.
    """
    match = _NAME.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise InputError(f"a feature is named LAYER/FEATURE, such as 5/678, not {brief(text)}")
    return int(match[1]), int(match[2])


def feature_name(layer: int, feature: int) -> str:
    """`5/678`, as `parse_feature` reads it."""
    return f"{layer}/{feature}"

"""What visitors may not read: where things lie on this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_PLACE = re.compile(r"(?<![\w.:/<])(?:/[^/\s'\"<>|;,]+)+/(?=[^/\s'\"<>|;,])|\b[A-Za-z]:\\(?:[^\\\s'\"<>|;,]+\\)+")
"""The folders of an absolute path; the file's own name stays."""


def discreet(text: str, names: Mapping[str, str]) -> str:
    """The text with every absolute path cut to its last part, those of `names` to what they are called there."""
    for place in sorted(names, key=len, reverse=True):
        text = text.replace(place, names[place])
    return _PLACE.sub("", text)


def discreet_value(value: Any, names: Mapping[str, str]) -> Any:
    """Plain data with all its texts made `discreet`."""
    if isinstance(value, str):
        return discreet(value, names)
    if isinstance(value, dict):
        return {key: discreet_value(one, names) for key, one in value.items()}
    return [discreet_value(one, names) for one in value] if isinstance(value, list | tuple) else value

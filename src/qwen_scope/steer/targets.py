"""Targets at hand: callables from texts to one number per text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from qwen_scope.errors import InputError

Target = Callable[[list[str]], np.ndarray]
"""What a sweep or a verdict asks of a continuation: `target(texts)` is one finite number per text."""


def matches(pattern: str) -> Target:
    """1 where a regular expression is found in the text, else 0.

    Raises:
        InputError: not a regular expression.
    """
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise InputError(f"{pattern!r} is not a regular expression: {error}") from None
    return lambda texts: np.array([float(found.search(text) is not None) for text in texts])


@cache
def script(name: str) -> Target:
    """The share of a text's letters that belong to a Unicode script, such as `CYRILLIC`, `CJK` or `HANGUL`.

    A letter belongs to the script its Unicode name begins with; a text without letters counts 0.

    Raises:
        InputError: no letter's name begins so.
    """
    wanted = name.strip().upper().replace("_", " ")
    if not wanted or not any(_script(chr(i)).startswith(wanted) for i in range(0x20, 0x11000)):
        raise InputError(f"no letter of Unicode belongs to a script {name!r}; try LATIN, CYRILLIC, ARABIC, CJK, HANGUL")

    def share(text: str) -> float:
        letters = [char for char in text if char.isalpha()]
        return sum(_script(char).startswith(wanted) for char in letters) / len(letters) if letters else 0.0

    return lambda texts: np.array([share(text) for text in texts])


def _script(char: str) -> str:
    return unicodedata.name(char, "") if char.isalpha() else ""


def evaluate(target: Target, texts: Sequence[str]) -> np.ndarray:
    """The target's numbers, `(texts,)` float64.

    Raises:
        InputError: not one finite number per text.
    """
    values = np.asarray(target(list(texts)), dtype=np.float64)
    if values.shape != (len(texts),) or not np.isfinite(values).all():
        raise InputError(f"a target gives one finite number per text; for {len(texts)} texts it gave {values!r:.80}")
    return values

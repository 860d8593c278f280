"""Targets at hand: callables from texts to one number per text."""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import regex

from qwen_scope.errors import InputError, brief, foreign

Target = Callable[[list[str]], np.ndarray]
"""What a sweep or a verdict asks of a continuation: `target(texts)` is one finite number per text."""


PATTERN = 1000
"""Characters of a regular expression from outside."""

SECONDS = 10.0
"""What the searches of one target may take together; an ordinary search takes microseconds."""

_RECURSION = re.compile(r"\(\?(?:R\)|[+-]?[0-9]|&|P>)")
_NOTHING = re.compile(r"\[\^\\(?:w\\W|W\\w|s\\S|S\\s|d\\D|D\\d)\]")
_BRACES = re.compile(r"\\[pPN]\{[^{}]*\}|\\.|\{(?![0-9]*,?[0-9]*\})", re.DOTALL)


def matches(pattern: str, seconds: float = SECONDS) -> Target:
    """1 where a regular expression is found in the text, else 0.

    A pattern may take exponential time, so the searches of a target have a budget, and other threads run meanwhile.
    The syntax is Python's, with `\\p{...}` besides; without recursion, whose memory nothing bounds.

    Args:
        pattern: up to `PATTERN` characters.
        seconds: what all searches of this target may take together.

    Raises:
        InputError: not a regular expression, or too long; on a call of the target: the time is up.
    """
    if not isinstance(pattern, str) or not 0 < len(pattern) <= PATTERN:
        raise InputError(f"a regular expression is a text of 1 to {PATTERN:,} characters, not {brief(pattern)}")
    if _RECURSION.search(pattern):
        raise InputError(f"the regular expression {brief(pattern)} calls itself, which is not supported")
    # `regex` reads a brace that is no repetition as a fuzzy match, Python's `re` as a brace; and a set of nothing, such
    # as [^\s\S], as one of everything.
    literal = _BRACES.sub(lambda found: r"\{" if found[0] == "{" else found[0], _NOTHING.sub("(?!)", pattern))
    with foreign(f"{brief(pattern)} is not a regular expression", InputError):
        expression = regex.compile(literal, cache_pattern=False)
    left = seconds

    def found(text: str) -> bool:
        nonlocal left
        started = time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            # `concurrent` lets other threads run during the search, which otherwise nobody could interrupt.
            return expression.search(text, timeout=left, concurrent=True) is not None
        except TimeoutError:
            raise InputError(
                f"the regular expression {brief(pattern)} takes more than {seconds:g} s on these texts; repetitions"
                " inside repetitions, such as (a+)+, are what takes long"
            ) from None
        finally:
            left -= time.monotonic() - started

    return lambda texts: np.array([float(found(text)) for text in texts])


@lru_cache(64)
def script(name: str) -> Target:
    """The share of a text's letters that belong to a Unicode script, such as `CYRILLIC`, `CJK` or `HANGUL`.

    A letter belongs to the script its Unicode name begins with; a text without letters counts 0.

    Raises:
        InputError: no letter's name begins so.
    """
    wanted = name.strip().upper().replace("_", " ")
    if not wanted or not any(_script(chr(i)).startswith(wanted) for i in range(0x20, 0x11000)):
        raise InputError(
            f"no letter of Unicode belongs to a script {brief(name)}; try LATIN, CYRILLIC, ARABIC, CJK, HANGUL"
        )

    def share(text: str) -> float:
        letters = [char for char in text if char.isalpha()]
        return sum(_script(char).startswith(wanted) for char in letters) / len(letters) if letters else 0.0

    return lambda texts: np.array([share(text) for text in texts])


def _script(char: str) -> str:
    return unicodedata.name(char, "") if char.isalpha() else ""


def target_values(target: Target, texts: Sequence[str]) -> np.ndarray:
    """The target's numbers, `(texts,)` float64.

    Raises:
        InputError: not one finite number per text.
    """
    values = np.asarray(target(list(texts)), dtype=np.float64)
    if values.shape != (len(texts),) or not np.isfinite(values).all():
        raise InputError(f"a target gives one finite number per text; for {len(texts)} texts it gave {values!r:.80}")
    return values

"""What the owner of released weights asks of those who use them; kept through conversion by the name of the group."""

from __future__ import annotations

import logging
import re

QWEN = "these SAEs carry Qwen's own licence, and their card asks not to use them to remove a model's safety behaviour"
USAGE = "USAGE.txt"
"""The file beside exported weights that says so."""
OF_QWEN = re.compile(r"(Qwen/)?SAE-Res-Qwen3(\.[0-9]+)?-.+")

_TOLD: set[str] = set()


def terms_of(group: str) -> str | None:
    """What the owner of a group of SAEs asks, as a sentence without its full stop; None where nothing is known."""
    return QWEN if OF_QWEN.fullmatch(group) else None


def tell_terms(group: str) -> None:
    """Say it where weights are loaded, once in a process and quietly: as a note of the logger `qwen_scope`."""
    terms = terms_of(group)
    if terms is not None and terms not in _TOLD:
        _TOLD.add(terms)
        logging.getLogger("qwen_scope").info(terms)

"""Rows of a corpus that can't be used: counted by reason, and said once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from qwen_scope.errors import QwenScopeWarning

from .document import Unreadable


def tell_unused(counts: Mapping[str, int], of: int, name: str, first: Unreadable | None = None) -> None:
    """Say in a warning how many rows can't be used, if there are any, and what is wrong with the first."""
    if counts:
        warnings.warn(
            f"{sum(counts.values())} of {of} rows of {name} can't be used and are passed over:"
            f" {by_reason(counts)}{the_first(first)}",
            QwenScopeWarning,
            3,
        )


def the_first(row: Unreadable | None) -> str:
    """The first row that can't be used, as the end of a sentence."""
    return "" if row is None else f" (the first: row {row.row} of {row.source}: {row.detail})"


def by_reason(counts: Mapping[str, int]) -> str:
    """Rows that can't be used, by reason, as the end of a sentence."""
    return ", ".join(f"{n} {why}" for why, n in counts.items())

"""Rows of a corpus that can't be used: counted by reason, and said once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from qwen_scope.errors import QwenScopeWarning


def tell_unused(counts: Mapping[str, int], of: int, name: str) -> None:
    """Say in a warning how many rows can't be used, if there are any."""
    if counts:
        warnings.warn(
            f"{sum(counts.values())} of {of} rows of {name} can't be used and are passed over: {by_reason(counts)}",
            QwenScopeWarning,
            3,
        )


def by_reason(counts: Mapping[str, int]) -> str:
    """Rows that can't be used, by reason, as the end of a sentence."""
    return ", ".join(f"{n} {why}" for why, n in counts.items())

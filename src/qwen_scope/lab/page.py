"""A text under construction that remembers which stretch came from what."""

from __future__ import annotations

from collections.abc import Mapping

from .types import Span


class Page:
    """Text and spans, appended together so that they cannot disagree."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = 0
        self.spans: list[Span] = []

    def add(self, text: str, factors: Mapping[str, str] | None = None) -> None:
        """Appends text, labelled when factors are given."""
        if factors is not None:
            self.spans.append(Span(self._length, self._length + len(text), factors))
        self._parts.append(text)
        self._length += len(text)

    @property
    def text(self) -> str:
        """Everything so far."""
        return "".join(self._parts)

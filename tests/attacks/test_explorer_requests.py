"""A small version of `explorer_requests.py`: a served page keeps its memory, and two browsers' sessions apart."""

from __future__ import annotations

import pytest
from explorer_requests import TEXTS, same_text, shown, two_sessions


@pytest.mark.slow
def test_memory_stays_flat_over_requests_of_one_text() -> None:
    later = [megabytes for number, megabytes in same_text(240, every=40) if number >= 120]
    assert max(later) - min(later) < 15  # what a call left behind came to 48 MB in as many


@pytest.mark.slow
def test_two_sessions_do_not_mix() -> None:
    assert two_sessions(32) == 0


def test_mixing_would_be_seen() -> None:
    buttons = "".join(
        f'<button data-pick="token:{i}" class="x">{word}</button>' for i, word in enumerate(["Der", " Zug"])
    )
    told = buttons.replace('"', r"\"")
    assert shown(told) == "Der Zug"
    assert shown(told) not in TEXTS

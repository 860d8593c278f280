"""A visitor who waits is told what for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from qwen_scope.explorer import stages
from qwen_scope.explorer.stages import Waiting, patiently, stage


def test_quick_work_says_nothing() -> None:
    assert list(patiently(iter([1, 2, 3]), "counting")) == [1, 2, 3]


def test_each_stage_of_slow_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "PATIENCE", 0.01)
    go_on = threading.Event()

    def work() -> Iterator[int]:
        assert go_on.wait(20)
        go_on.clear()
        stage("loading")
        assert go_on.wait(20)
        yield 1

    told = []
    for one in patiently(work(), "beginning"):
        told.append(one)
        if isinstance(one, Waiting):
            go_on.set()
            time.sleep(0.01)
    assert next(one.words for one in told if isinstance(one, Waiting)) == "beginning"
    assert "loading" in [one.words for one in told if isinstance(one, Waiting)]
    assert told[-1] == 1


def test_what_goes_wrong_is_raised_and_a_visitor_who_leaves_ends_the_work() -> None:
    def wrong() -> Iterator[int]:
        yield 1
        raise ValueError("so")

    found = patiently(wrong(), "counting")
    assert next(found) == 1
    with pytest.raises(ValueError, match="so"):
        next(found)
    left = []

    def long() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            left.append(True)

    some = patiently(long(), "counting")
    assert next(some) == 1
    some.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert left == [True]


def test_a_stage_that_nobody_waits_for_goes_unheard() -> None:
    stage("alone")

"""Foreign calls end in one sentence, and foreign text cannot steer a terminal."""

from __future__ import annotations

import pytest

from qwen_scope.errors import FormatError, InputError, NotFoundError, foreign, printable


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("first\nsecond"), "FILE can't be read: first"),
        (
            ValueError("Errors in loading:\n\n\tsize mismatch for w: 4\n\tand more"),
            "FILE can't be read: Errors in loading: size mismatch for w: 4",
        ),
        (KeyError("name"), "FILE can't be read: 'name' is missing"),
        (PermissionError(13, "Permission denied", "/x"), "FILE can't be read: Permission denied"),
        (RecursionError("maximum depth"), "FILE can't be read: nested too deeply"),
        (MemoryError(), "FILE can't be read: not enough memory"),
        (AssertionError(), "FILE can't be read: AssertionError"),
        (StopIteration(), "FILE can't be read: StopIteration"),
    ],
)
def test_whatever_is_raised_becomes_one_sentence(error: Exception, said: str) -> None:
    with pytest.raises(FormatError) as caught, foreign("FILE can't be read"):
        raise error
    assert str(caught.value) == said
    assert caught.value.__cause__ is error


def test_a_long_reason_is_cut_and_a_hint_follows() -> None:
    with pytest.raises(InputError) as caught, foreign("X", InputError, "try Y"):
        raise ValueError("a" * 5000)
    assert len(str(caught.value)) < 400
    assert str(caught.value).endswith("…; try Y")


@pytest.mark.parametrize("error", [NotFoundError("ours"), KeyboardInterrupt(), BrokenPipeError(), SystemExit(3)])
def test_ours_and_interrupts_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, foreign("X"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m", "\\x9b31m"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x00\x07\x7f", "\\x00\\x07\\x7f"),
        ("a\u2028b\u2029c\u0085d", "a\\u2028b\\u2029c\\x85d"),
        ("user\u202etxt.exe", "user\\u202etxt.exe"),
        ("\u2066x\u2069", "\\u2066x\\u2069"),
        ("lone \ud800", "lone \\ud800"),
    ],
)
def test_what_steers_a_terminal_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    "text", ["Grüße", "车站在哪里？", "مرحبا", "👩‍👩‍👧 family", "שלום", "e\u0301", "a\u00a0b", "\ufeff", "[bold]x"]
)
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert printable(text) == text


def test_a_text_of_several_lines_keeps_them() -> None:
    assert printable("a\n\x1bb", keep="\n") == "a\n\\x1bb"

"""JSON from outside is read with exact types, and what does not fit is said in one short sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from qwen_scope.errors import FormatError, InputError, NotFoundError, brief, check_count, check_number
from qwen_scope.files import Fields, parse_object, read_object

NO_COUNT = [True, False, np.True_, -1, 2.0, 5.9, math.nan, "3", None, [], {}, 2**64]
NO_NUMBER = [True, np.True_, math.nan, math.inf, -math.inf, np.float32("nan"), "0.5", None, [1.0], 10**400]


@pytest.mark.parametrize("value", NO_COUNT, ids=brief)
def test_a_count_is_a_whole_number_and_nothing_else(value) -> None:
    with pytest.raises(FormatError, match="'n' of the thing must be a whole number"):
        Fields({"n": value}, "the thing").count("n")
    with pytest.raises(InputError, match=r"^n must be a whole number between 0 and 9; got "):
        check_count("n", value, 0, 9)


@pytest.mark.parametrize("value", NO_NUMBER, ids=brief)
def test_a_number_is_finite_and_no_boolean(value) -> None:
    with pytest.raises(FormatError, match="'x' of the thing must be a finite number"):
        Fields({"x": value}, "the thing").number("x")
    with pytest.raises(FormatError, match="an entry of 'x' of the thing must be a finite number"):
        Fields({"x": [0.5, value]}, "the thing").numbers("x")


def test_what_fits_comes_back_as_plain_python() -> None:
    one = Fields({"n": 3, "x": 0, "t": "a", "f": False, "l": [1, 2], "o": {"a": 1}, "none": None}, "it")
    assert (one.count("n"), one.text("t"), one.flag("f"), one.counts("l"), one.object("o")) == (
        3,
        "a",
        False,
        (1, 2),
        {"a": 1},
    )
    assert type(one.number("x")) is float
    assert type(check_count("n", np.int64(3))) is int
    assert check_number("x", np.float32(0.5)) == 0.5
    assert one.maybe(one.text, "none") is None
    assert one.maybe(one.text, "absent") is None
    assert one.maybe(one.text, "t") == "a"


@pytest.mark.parametrize(
    ("read", "value"),
    [("text", 1), ("text", None), ("flag", 0), ("flag", 1), ("items", {}), ("object", []), ("flag", "")],
)
def test_other_kinds_are_not_converted(read: str, value) -> None:
    with pytest.raises(FormatError, match="'k' of it is "):
        getattr(Fields({"k": value}, "it"), read)("k")


@pytest.mark.parametrize("version", [True, 1.0, "1", None, 2, -1, [1]])
def test_a_version_is_exactly_the_number(version) -> None:
    with pytest.raises(FormatError, match="this package reads version 1"):
        Fields({"version": version}, "it").header(1)
    Fields({"version": 1, "format": "f"}, "it").header(1, "f")
    with pytest.raises(FormatError, match="format 'f'"):
        Fields({"version": 1, "format": True}, "it").header(1, "f")


def test_keys_are_exact_and_the_nearest_is_named() -> None:
    assert Fields({"a": 1, "more": 2}, "it", ["a"], ["more"]).count("more") == 2
    with pytest.raises(FormatError, match="it lacks 'threshold'"):
        Fields({"layer": 1}, "it", ["layer", "threshold"])
    with pytest.raises(FormatError, match="no key 'treshold'; did you mean 'threshold'"):
        Fields({"threshold": 1, "treshold": 2}, "it", ["threshold"])
    with pytest.raises(FormatError, match="an object with keys, not \\[1\\]"):
        Fields([1], "it")


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "b": 1}}',
        b"[1]",
        b"3",
        b"",
        b"{",
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"null",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_what_is_no_json_object_is_one_sentence(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    path.write_bytes(text)
    with pytest.raises(FormatError, match=r"given\.json") as caught:
        read_object(path)
    assert len(str(caught.value)) < 400 + len(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no file .*; make one with x"):
        read_object(tmp_path / "none.json", "make one with x")
    with pytest.raises(FormatError, match="can't be read"):
        read_object(tmp_path)
    assert parse_object(json.dumps({"a": [1, None, {"b": 2}]}), "it") == {"a": [1, None, {"b": 2}]}


def test_what_is_refused_is_shown_without_being_spelt_out() -> None:
    """Nested aliases of a 484-byte YAML file are 10^9 entries when spelt out."""
    nested: list = ["x" * 9] * 9
    for _ in range(12):
        nested = [nested] * 9
    for value in (nested, {"a": nested}, "y" * 10**6, 1 << 10**6, {"k": 1 << 10**5}):
        assert len(brief(value)) <= 60

"""JSON and YAML from outside: what is read, and what ends in one sentence before it costs anything."""

from __future__ import annotations

import json
import resource
import time

import pytest
import yaml

from qwen_scope.errors import FormatError
from qwen_scope.files import parse_value

DATA = {"name": "Ruhe 手", "n": 3, "x": -0.25, "small": 1e-7, "none": None, "on": True, "list": [1, [2, {"a": "yes"}]],
        "text": "2024-01-01", "many": "a\nb: c\n", "empty": {}, "void": [], "big": 2**63}  # fmt: skip

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize("encode", [str, str.encode])
def test_what_was_written_is_read(encode) -> None:
    assert parse_value(encode(json.dumps(DATA)), "it") == DATA
    assert parse_value(encode(yaml.safe_dump(DATA, allow_unicode=True)), "it", "YAML") == DATA
    data = {**DATA, "small": 0.25}  # YAML 1.1 knows 1.0e-07 and reads 1e-07 as a text
    assert parse_value(encode(json.dumps(data)), "it", "YAML") == data


REFUSED_YAML = {
    "a bomb": BOMB,
    "an anchor": "a: &x 1\n",
    "an alias": "a: *x\n",
    "itself": "&x [*x]\n",
    "a merge": "a: {<<: {b: 1}}\n",
    "a date": "made: 2024-01-01\n",
    "a time": "made: 2001-12-14t21:59:43.10-05:00\n",
    "python": "!!python/object/apply:os.system ['true']\n",
    "binary": "a: !!binary aGk=\n",
    "a set": "!!set {a, b}\n",
    "an own tag": "!x {a: 1}\n",
    "twice": "a: 1\nb: 2\na: 3\n",
    "twice inside": "a: {b: 1, b: 1}\n",
    "a number as a key": "1: a\n",
    "a list as a key": "? [a, b]\n: 1\n",
    "null as a key": "~: 1\n",
    "octal": "a: 010\n",
    "hexadecimal": "a: 0xff\n",
    "base 60": "a: 1:30\n",
    "base 60 with a fraction": "a: 1:30.5\n",
    "a long number": f"a: {'9' * 5000}\n",
    "deep": "[" * 5000,
    "deep blocks": "".join(" " * i + "a:\n" for i in range(100)),
    "two documents": "a: 1\n---\nb: 2\n",
    "a tab": "a:\n\t- b: [",
    "a control character": "a: \x07\n",
    "no UTF-8": b"\xff\xfe\x00",
    "a directive": "%YAML 9.9\n---\na: 1\n",
    "many": "[" + "1," * 500_000 + "]",
}
REFUSED_JSON = {
    "deep": "[" * 65 + "]" * 65,
    "very deep": '{"a":' * 100_000,
    "a long number": f"[{'9' * 41}]",
    "a very long number": f"[{'9' * 100_000}]",
    "twice": '{"a": 1, "b": 2, "a": 3}',
    "twice at the end": json.dumps({str(i): i for i in range(100_000)})[:-1] + ', "0": 1}',
    "many": "[" + "[]," * 2_100_000 + "1]",
    "no UTF-8": b'{"a": "\xff"}',
    "nothing": "",
    "a half": '{"a": ',
    "two": "{} {}",
}


@pytest.mark.parametrize(
    ("form", "text"),
    [pytest.param("YAML", text, id=f"YAML: {name}") for name, text in REFUSED_YAML.items()]
    + [pytest.param("JSON", text, id=f"JSON: {name}") for name, text in REFUSED_JSON.items()],
)  # fmt: skip
def test_what_is_refused_costs_little_and_is_one_sentence(form, text) -> None:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(FormatError, match=r"^given") as caught:
        parse_value(text, "given", form)
    assert time.process_time() - started < 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_bounds_themselves_are_read() -> None:
    deep = json.loads("[" * 64 + "]" * 64)
    for form in ("JSON", "YAML"):
        assert parse_value("[" * 64 + "]" * 64, "it", form) == deep
        assert parse_value("9" * 40, "it", form) == int("9" * 40)

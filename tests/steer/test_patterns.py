"""Regular expressions from outside: found as Python's `re` finds them, in bounded time, while others work."""

from __future__ import annotations

import re
import threading
import time

import numpy as np
import pytest

from qwen_scope.errors import InputError
from qwen_scope.steer import matches

TEXTS = ["Hallo Welt", "x^{i} + y{2}", "aab\nccd", "{e<=3} done", "", "Äpfel 42", "((?R))"]


@pytest.mark.parametrize(
    "pattern",
    [r"\bWelt$", r"\^{i}", r"y\{2}", r"a{2}b", r"a{,3}b", r"(?m)^c+d$", r"{e<=3}", r"[{}]", r"(?i)ÄPFEL", r"\d{2,}",
     r"^$", r"(?P<x>c)(?P=x)", r"\N{LATIN SMALL LETTER C}", r"x{", r"{", r"{}", r"(?=.*l)(?!.*x)", r"\(\(\?R",
     r"[^\s\S]", r"x[^\W\w]?", r"[^\w\s]", r"[\d\D]"],
)  # fmt: skip
def test_a_pattern_means_what_it_means_in_python(pattern: str) -> None:
    expected = [float(re.search(pattern, text) is not None) for text in TEXTS]
    np.testing.assert_array_equal(matches(pattern)(TEXTS), expected)


@pytest.mark.parametrize(
    "pattern",
    ["(", "[", "*", "a" * 1001, "", r"(?P<a>x)(?P<a>", r"\p{Nonsense}", r"\L<names>", "(" * 500 + ")" * 500, "(?<=",
     "(?R)", "a(?R)?b", "(?P<x>a|(?&x)(?&x))b", "(a)(?1)", "(a)(?P>x)"],
)  # fmt: skip
def test_what_is_no_pattern_is_one_sentence(pattern: str) -> None:
    with pytest.raises(InputError) as error:
        matches(pattern)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|aa)+$", r"(a?){3000}a{3000}b", r"(.*a){20}b", r"(?:a|a)*$"])
def test_a_slow_pattern_ends_and_delays_nobody(pattern: str) -> None:
    gaps, stop = [], threading.Event()

    def others() -> None:
        while not stop.is_set():
            started = time.monotonic()
            stop.wait(0.005)
            gaps.append(time.monotonic() - started)

    beside = threading.Thread(target=others)
    beside.start()
    slow = matches(pattern, seconds=0.3)
    started = time.process_time()
    with pytest.raises(InputError, match=r"takes more than 0.3 s"):
        slow(["a" * 3000 + "!"] * 100)
    assert time.process_time() - started < 1.5
    stop.set()
    beside.join()
    assert max(gaps) < 1


def test_the_budget_is_for_all_texts_and_calls_together() -> None:
    target = matches(r"(a+)+$", seconds=0.2)
    with pytest.raises(InputError):
        target(["a" * 3000 + "!"])
    with pytest.raises(InputError, match="takes more than"):
        target(["quick"])
    assert matches("quick", seconds=0.2)(["quick"] * 1000).sum() == 1000

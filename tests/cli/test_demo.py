"""What the demo says of a feature holds in the lines that it prints below."""

from __future__ import annotations

import re

import pytest

from qwen_scope.cli import main

# By claim, which of the four texts (English and rude, German and rude, Chinese, sums) it is true of.
TRUE_OF = {"English": 0, "German": 1, "Chinese": 2, "rude English": 0, "sums": 3}
CLAIM = r"Feature \d+ of layer \d,.*? tells|Feature \d+ of layer \d tells"


def test_each_claim_holds_in_its_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    parts = re.split(CLAIM, out.partition("2. What")[2].partition("3. Two")[0])[1:]
    assert len(parts) == len(TRUE_OF)
    for part, (factor, at) in zip(parts, TRUE_OF.items(), strict=True):
        assert part.startswith(f" {factor} from ")
        limit = float(re.search(r"exceeds ([\d.]+)", part)[1])  # pyright: ignore[reportOptionalSubscript]
        lines = re.findall(r"^    (yes|no) +([\d.]+)  ", part, re.MULTILINE)
        assert [said for said, _ in lines] == ["yes" if i == at else "no" for i in range(4)], factor
        assert all((float(value) > limit) == (said == "yes") for said, value in lines)

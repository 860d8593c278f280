"""Numbers are never broken over lines, whatever the width; text is."""

from __future__ import annotations

import re

import pytest

from qwen_scope.cli import main, output

INTERVALS = [(5, 1923, "max > 2.27", "0.95 [0.80, 1.00]", "0.99 [0.97, 1.00]", "12.5 [10.1, 15.2]", 1.234e-08, "")]
FEATURES = "  ".join(f"{i}:{i / 7:.3g}" for i in range(2040, 2050))
LONG = "a text of many words that no terminal holds in one line of eighty columns, not even when it is alone"
TABLES = {
    "features": (
        ("#", "token", "features"),
        [(17, "' weather'", FEATURES)],
    ),
    "compare": (
        ("layer", "feature", "in the first", "in the second", "difference"),
        [(4, 20481, "100%", "0%", "+100%")],
    ),
    "find": (("layer", "feature", "is above", "F1", "AUROC", "difference", "q", ""), INTERVALS),
    "train": (
        ("hook point", "FVU", "w/o first", "EV/token", "cosine", "L0", "dead", "CE rec.", "KL"),
        [("layers.14.resid_post", 0.12345678, 0.1234, 0.87654, 0.9876, 50.123, 0.001234, 0.98765, 0.012345)],
    ),
    "transfer": (
        ("hook point", "FVU base", "FVU here", "rise", "Jaccard", "cosine"),
        [("layers.14.resid_post", *(["0.123 (0.101 to 0.145)"] * 5))],
    ),
    "sweep": (
        ("amount", "effect", "95% interval", "perplexity", "repetition", "KL", "in budget"),
        [(0.644742, 0.9167, "0.792 to 1", 123456.7, 0.006579, 0.3374, "yes")],
    ),
    "analyze": (
        ("pair", "shared", "95% interval"),
        [("a-rather-long-name and another-name", 0.1234, "0.10-0.14")],
    ),
    "labels": (("feature", "detection", "by", "name"), [(131071, "0.95 [0.80, 1.00]", "gpt-oss-120b", LONG)]),
    "numbers": (tuple("abcdefghijkl"), [tuple(123456.7 + i for i in range(12))]),
    "memory": (("what", "bytes"), [(LONG, "2.15 GB")]),
    "wide letters": (("token", "logit"), [("东西" * 60, 0.1234)]),
    "nothing": (("a", "b"), []),
}


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("name", TABLES)
def test_numbers_stay_whole(name: str, width: int, monkeypatch, capsys) -> None:
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", str(width))
    columns, rows = TABLES[name]
    output.show("Title", columns, rows)
    lines = capsys.readouterr().out.splitlines()[1:]
    shown = set(" ".join(lines).split())
    for row in rows:
        for cell in row:
            text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
            for number in re.findall(r"(?<!\S)[\d.,:%+()\[\]e-]*\d[\d.,:%+()\[\]e-]*(?!\S)", text):
                assert number in shown, f"{number} is broken in\n" + "\n".join(lines)
    if name not in ("numbers", "transfer", "find", "train") and width >= (80 if name == "sweep" else 60):
        assert max(map(cell_len, lines)) <= width


def test_a_name_that_is_not_in_the_last_column_stays_whole(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    output.show("", ("group", "k"), [("SAE-Res-Qwen3.5-35B-A3B-Base-W128K-L0_100", 100)])
    assert "SAE-Res-Qwen3.5-35B-A3B-Base-W128K-L0_100  100" in capsys.readouterr().out


def test_the_catalog_fits_80_columns_with_a_line_per_group(monkeypatch, capsys) -> None:
    from qwen_scope.sae import catalog

    monkeypatch.setenv("COLUMNS", "80")
    assert main(["catalog"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("SAE-Res-") for line in lines) == len(catalog.groups())

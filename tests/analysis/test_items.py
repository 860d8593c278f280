"""Redundant items, by brute force; an analysis begins with a sentence and gives a row per item in files."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import made
import pyarrow.parquet as pq
import pytest

from qwen_scope.analysis import ANALYSES, redundancy_of, redundant_items
from qwen_scope.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "store"))
import stores

SETS = [{0, 1, 2}, {0, 1, 2}, {3}, {0, 3}, {4, 5}, {4}]


def test_what_is_left_holds_every_feature() -> None:
    rows = redundant_items(made.dataset(SETS), 0.9)
    left = [sets for sets, row in zip(SETS, rows, strict=True) if not row["redundant"]]
    assert set().union(*left) == set().union(*SETS)
    assert sum(row["redundant"] for row in rows) == 3
    alone = [sum(not any(f in other for j, other in enumerate(SETS) if j != i) for f in one)
             for i, one in enumerate(SETS)]  # fmt: skip
    assert [row["only_here"] for row in rows] == alone
    assert [row["twin"] for row in rows] == ["a1", "a0", None, None, None, None]


def test_random_sets_against_brute_force() -> None:
    for seed in range(5):
        sets = made.random_sets(25, 30, seed, 0.15)
        rows = redundant_items(made.dataset(sets, 30), 0.4)
        left = [one for one, row in zip(sets, rows, strict=True) if not row["redundant"]]
        assert set().union(*left) == set().union(*sets)
        for i, row in enumerate(rows):
            like = [(len(sets[i] & other) / len(sets[i] | other), j) for j, other in enumerate(sets) if j != i]
            best = max(share for share, _ in like)
            assert row["similarity"] == (pytest.approx(best) if best >= 0.4 else None)


def test_the_verdict_counts_what_the_rows_say() -> None:
    result = redundancy_of([made.dataset(SETS)], draws=5)
    assert result.verdict.startswith("3 of 6 items of a (50%) are redundant")
    assert "2 have a twin" in result.verdict
    assert result.items is not None
    assert sum(result.items.to_arrow()["redundant"].to_pylist()) == 3
    assert result.data["a"]["redundant"] == [row[1] for row in result.items.rows if row[4]]


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_says_a_sentence_and_writes_its_items(name: str, tmp_path: Path, capsys) -> None:
    for folder in ("s", "t"):
        stores.make(tmp_path / folder).close()
    both = [str(tmp_path / "s"), str(tmp_path / "t"), "--layer", "0"]
    assert main(["analyze", name, *both, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    first = capsys.readouterr().out.split("\n\n")[0]
    assert first.rstrip().endswith(".")
    with (tmp_path / "out" / "items.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(stores.TEXTS) * (1 if name == "drift" else 2)
    assert pq.read_table(tmp_path / "out" / "items.parquet").num_rows == len(rows)
    assert main(["analyze", name, *both, "--out", str(tmp_path / "x.csv")]) == 0, capsys.readouterr().err
    assert (tmp_path / "x.csv").read_bytes() == (tmp_path / "out" / "items.csv").read_bytes()

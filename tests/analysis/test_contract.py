"""Every entry of `ANALYSES` keeps the contract; an entry nobody here knows gets its command by itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import made
import numpy as np
import pytest

from qwen_scope.analysis import ANALYSES, Analysis, Dataset, Result, Table, read_scores
from qwen_scope.cli import main
from qwen_scope.cli.analyze import strict
from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError
from qwen_scope.report import figure_page, save_png

sys.path.insert(0, str(Path(__file__).parents[1] / "store"))
import stores


def several(scores: bool = True) -> list[Dataset]:
    rng = np.random.default_rng(0)
    return [
        made.dataset(
            made.random_sets(12, 20, i, 0.2),
            20,
            name,
            scores=rng.random((12, 5)) if scores else None,
            texts=tuple(f"<b>{name}</b> {j}" for j in range(12)),
        )
        for i, name in enumerate(("a", "<script>b"))
    ]


@pytest.mark.parametrize("name", ANALYSES)
@pytest.mark.parametrize("scores", [True, False])
def test_an_analysis_is_pure_and_can_be_shown(name: str, scores: bool, tmp_path) -> None:
    analysis = ANALYSES[name]
    datasets = several(scores)
    before = [d.item.copy() for d in datasets]
    result = analysis.run(datasets)
    assert analysis.run(datasets).data == result.data
    assert all((d.item == item).all() for d, item in zip(datasets, before, strict=True))
    json.dumps(strict(result.data), allow_nan=False)
    assert result.tables
    for table in result.tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
    page = figure_page("<title>", [(t.title, t.columns, t.rows) for t in result.tables], result.figures, result.notes)
    assert "<script>" not in page
    assert "http" not in page
    for i, figure in enumerate(result.figures):
        save_png(figure, tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises((InputError, MismatchError)):
        analysis.run([datasets[0], made.dataset([{1}], 20, "c", sae="other")])


def busiest(datasets: Sequence[Dataset], *, n: Annotated[int, "How many features."] = 3) -> Result:
    """The features that fire on most items.

    Raises:
        InputError: never.
    """
    rows = [(d.name, *np.argsort(-d.counts(), kind="stable")[:n].tolist()) for d in datasets]
    return Result({row[0]: row[1:] for row in rows}, (Table("Busiest", ("dataset", *map(str, range(n))), rows),))


def test_one_line_gives_a_command(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(ANALYSES, "busiest", Analysis(busiest, reduction="any"))
    stores.make(tmp_path / "s").close()
    code = main(["analyze", "busiest", str(tmp_path / "s"), "--layer", "2", "--n", "2", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found = json.loads(out)["s"]
    dense = stores.dense(2)
    counts = sum((document > 0).any(0).astype(int) for document in dense)
    assert found == np.argsort(-counts, kind="stable")[:2].tolist()
    assert main(["analyze", "busiest", "--help"]) == 0
    assert "How many features." in capsys.readouterr().out


def test_a_dataset_from_a_store_is_its_firing_table(tmp_path) -> None:
    with stores.make(tmp_path / "s") as store:
        for reduction in ("any", "last", "max"):
            data = Dataset.from_store(store, 0, reduction, texts=True)
            dense = stores.dense(0)
            assert len(data) == len(dense)
            for i, document in enumerate(dense):
                expected = document[-1] if reduction == "last" else document.max(0)
                assert set(data.feature[data.item == i].tolist()) == set(np.flatnonzero(expected > 0).tolist())
            assert data.texts == tuple(stores.TEXTS)
        part = data.take([3, 1])
        assert set(part.feature[part.item == 1].tolist()) == set(data.feature[data.item == 1].tolist())
        assert part.ids == (data.ids[3], data.ids[1])


def test_commands_end_in_files_or_one_sentence(capsys, tmp_path) -> None:
    rng = np.random.default_rng(0)
    for name in ("s", "t"):
        stores.make(tmp_path / name).close()
        rows = [f"{i},{','.join(str(x) for x in rng.random(4).round(3))}" for i in range(len(stores.TEXTS))]
        (tmp_path / f"{name}.csv").write_text("\n".join(["id,m1,m2,m3,m4", *rows]) + "\n")
    both = [str(tmp_path / "s"), str(tmp_path / "t"), "--layer", "0"]
    tables = ["--scores", str(tmp_path / "s.csv"), "--scores", str(tmp_path / "t.csv")]
    for name in ANALYSES:
        argv = ["analyze", name, *both, *tables, "--out", str(tmp_path / name)]
        assert main(argv) == 0, capsys.readouterr().err
        assert (tmp_path / name / "report.html").read_text().startswith("<!doctype html>")
        assert (tmp_path / name / "figure1.png").exists()
        assert capsys.readouterr().out
    one = ["redundancy", both[0], "--layer", "0"]
    (tmp_path / "short.csv").write_text("id,m1\n0,1\n1,\n")
    (tmp_path / "twice.csv").write_text("id,m1\n0,1\n0,1\n")
    for argv, sentence in (
        (["redundancy", str(tmp_path / "s")], "name one with --layer"),
        (["redundancy", str(tmp_path / "s"), "--layer", "1"], "has no layer 1"),
        (["redundancy", *both, "--reduction", "best"], "--reduction is one of"),
        (["redundancy", *both, "--names", "a"], "1 names for 2 stores"),
        (["redundancy", *both, "--names", "a,a"], "two datasets are called 'a'"),
        (["redundancy", *both, "--scores", "x.csv"], "give one for each"),
        (["overlap", *both[:1], "--layer", "0"], "at least 2 stores"),
        (["overlap", *both, "--general", "x"], "none of s, t"),
        (
            [*one, "--scores", str(tmp_path / "short.csv")],
            "no score of the model 'm1'",
        ),
        ([*one, "--scores", str(tmp_path / "twice.csv")], "the id '0' twice"),
        ([*one, "--scores", str(tmp_path / "none.csv")], "no table of scores"),
        ([*one, "--out", str(tmp_path / "s.csv")], "is a file"),
    ):
        assert main(["analyze", *argv]) == 2, argv
        err = capsys.readouterr().err
        assert sentence in err
        assert err.count("\n") == 1


def test_score_tables_are_read_strictly(tmp_path) -> None:
    def table(text: str):
        (tmp_path / "s.csv").write_text(text)
        return read_scores(tmp_path / "s.csv", ["x", "y"])

    assert table("id,a,b\ny,1,0\nx,0.5,1\n").values.tolist() == [[0.5, 1], [1, 0]]
    for text, error, match in (
        ("id,a\nx,1\n", InputError, "no scores for 1 of 2"),
        ("id,a,b\nx,1\ny,1,1\n", InputError, "no score of the model 'b' on the item 'x'"),
        ("id,a\nx,1\ny,two\n", FormatError, "no number"),
        ("id,a\nx,1\ny,nan\n", FormatError, "not finite"),
        ("id,a,a\nx,1,1\ny,1,1\n", FormatError, "names a model twice"),
        ("name,a\nx,1\ny,1\n", FormatError, "first line"),
        ("", FormatError, "first line"),
    ):
        with pytest.raises(error, match=match):
            table(text)
    with pytest.raises(NotFoundError):
        read_scores(tmp_path / "none.csv", ["x"])
    one = made.dataset([{1}], scores=np.ones((1, 2)))
    other = made.dataset([{1}], name="b", scores=np.ones((1, 3)))
    with pytest.raises(MismatchError, match="m2"):
        ANALYSES["redundancy"].run([one, other])

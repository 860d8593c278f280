"""Tables go into files for data frames, labelled tables come back with columns added, columns join to texts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typed import COMMANDS, LEAVES

from qwen_scope import FeatureStore, catalog, load_scope
from qwen_scope.analysis import Dataset, Student
from qwen_scope.cli import main
from qwen_scope.errors import InputError
from qwen_scope.report import Table, file_of, joined
from qwen_scope.text import Corpus, CorpusOptions


def records(path: Path) -> list[dict]:
    if path.suffix == ".csv":
        return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_features_of_each_token_in_a_file(kind: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / f"seen.{kind}"
    text = "Wie geht es dir?"
    assert main(["features", text, "--layers", "3,4", "--top", "2", "--out", str(out)]) == 0, capsys.readouterr().err
    seen = load_scope("lab").features([text], [3, 4])
    expected = []
    for layer in (3, 4):
        dense = seen.acts[layer].to_dense()[0]
        for i, token in enumerate(seen.tokens[0]):
            for value, feature in zip(*(x.tolist() for x in dense[i].topk(2)), strict=True):
                expected.append((i, token, layer, feature, value))
    found = [
        (int(r["position"]), r["token"], int(r["layer"]), int(r["feature"]), float(r["activation"]))
        for r in records(out)
    ]
    assert [one[:4] for one in found] == [one[:4] for one in expected]
    assert [one[4] for one in found] == pytest.approx([one[4] for one in expected])


# A tour, two servers, and one whose rows come back as a table with columns added.
NO_TABLES = {"demo": set(), "explore": set(), "serve": set(), "classify predict": {"out"}}


@pytest.mark.parametrize("path", LEAVES)
def test_every_command_has_a_file_for_its_tables(path: str) -> None:
    """With `--json` for programs; where `--out` is the folder of its work, that tells its figures."""
    names = {one.name for one in COMMANDS[path].params}
    assert NO_TABLES.get(path, {"as_json", "out"}) <= names


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--out", "x.xlsx"], "ends with .csv, .parquet, .json"),
        (["--out", "x.csv", "--json"], "leave it out"),
    ],
)
def test_files_that_no_table_goes_into(argv: list[str], sentence: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["catalog", *argv]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_tables_of_other_columns_get_files_of_their_own(tmp_path, capsys) -> None:
    assert main(["catalog", "--out", str(tmp_path / "c.csv")]) == 0, capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"c.csv", f"c-{len(catalog.community())}-groups-of-others.csv"}
    assert "SAE-Res-Qwen3-8B-Base-W64K-L0_50" in {row["group"] for row in records(tmp_path / "c.csv")}


def test_cells_of_several_kinds_and_hostile_text_survive() -> None:
    table = Table("t", ("a", "a", "b"), [(1, "=1+1", None), (2.5, 'q"\n', [1, {"x": None}]), (None, "\ud800", True)])
    rows = list(csv.reader(file_of(table, "csv").decode().splitlines(keepends=True)))
    assert rows[0] == ["a", "a", "b"]
    assert rows[2] == ["2.5", 'q"\n', '[1, {"x": null}]']
    frame = Table("t", ("a", "b"), [(1, "x"), (2.5, None), (None, 3)]).to_arrow()
    assert frame.to_pylist() == [{"a": 1.0, "b": "x"}, {"a": 2.5, "b": None}, {"a": None, "b": "3"}]
    assert [t.title for t in joined([Table("x", ("a",), [[1]]), Table("y", ("a",), [[2]])])] == ["x"]
    assert joined([Table("x", ("a",), [[1]]), Table("y", ("a",), [[2]])])[0].rows == [("x", 1), ("y", 2)]
    with pytest.raises(InputError, match="csv, parquet, json"):
        file_of(table, "xlsx")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    from qwen_scope.lab import documents

    path = tmp_path / "labelled.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "language", "price"])
        for language in ("de", "fr"):
            for i, one in enumerate(documents(n=30, kinds=["talk"], languages=[language])):
                writer.writerow([f"{language}{i}", one.text, language, i])
    return path


def test_a_labelled_table_comes_back_with_columns_added(labelled: Path, tmp_path: Path, capsys) -> None:
    out, rule = tmp_path / "judged.csv", tmp_path / "rule.json"
    argv = ["classify", "fit", str(labelled), "--label", "language=de", "--layers", "5", "--unit", "line"]
    assert main([*argv, "--out", str(out), "--rule", str(rule)]) == 0, capsys.readouterr().err
    before, after = records(labelled), records(out)
    assert [{k: v for k, v in row.items() if not k.startswith("de_")} for row in after] == [
        {"text": row.pop("text"), **row} for row in map(dict, before)
    ]
    right = sum((row["de_predicted"] == "True") == (row["language"] == "de") for row in after)
    assert right >= 54
    assert all(row["de_because"].startswith("5/") for row in after if row["de_predicted"] == "True")
    again = tmp_path / "again.parquet"
    assert main(["classify", "predict", str(rule), str(labelled), "--out", str(again)]) == 0, capsys.readouterr().err
    assert [str(row["de_predicted"]) for row in records(again)] == [row["de_predicted"] for row in after]
    capsys.readouterr()
    assert main(["classify", "predict", str(rule), str(again), "--out", str(tmp_path / "c.csv")]) == 2
    assert "a column 'de_" in capsys.readouterr().err
    for bad in (["--label", "language=xx"], ["--label", "language"], ["--label", "nosuch=1"], []):
        assert main(["classify", "fit", str(labelled), *bad, "--out", str(tmp_path / "no.csv")]) == 2, bad
        assert not (tmp_path / "no.csv").exists()


def test_a_student_judges_rows_too(labelled: Path, tmp_path: Path, capsys) -> None:
    rows = records(labelled)
    texts, labels = [row["text"] for row in rows], np.array([row["language"] == "de" for row in rows])
    Student.fit(texts, labels).save(tmp_path / "german.json")
    out = tmp_path / "judged.csv"
    argv = ["classify", "predict", str(tmp_path / "german.json"), str(labelled), "--out", str(out)]
    assert main(argv) == 0, capsys.readouterr().err
    judged = records(out)
    assert [row["language"] for row in judged] == [row["language"] for row in rows]
    assert (
        sum((row["german_predicted"] == "True") == bool(label) for row, label in zip(judged, labels, strict=True)) >= 54
    )


ROWS = [
    {"q": "Wer?", "a": "Ich {x}", "n": 3},
    {"q": "Was?", "a": None, "n": 1},
    {"q": "Wo?", "a": "Da", "n": None},
    {"q": "Wie?"},
]


def test_columns_join_to_one_text() -> None:
    options = CorpusOptions(template="{q}\n{a} ({n})")
    with pytest.warns(UserWarning, match="3 of 4 rows"):
        (found,) = Corpus.of(ROWS, options)
    assert found.text == "Wer?\nIch {x} (3)"
    assert found.meta == ROWS[0]
    assert "template" not in Corpus.of(ROWS, CorpusOptions()).description
    assert Corpus.of(ROWS, options).description["template"] == options.template
    with pytest.raises(InputError, match=r"'nope'.*name those in the template"):
        list(Corpus.of(ROWS[:1], CorpusOptions(template="{nope}")))
    with pytest.raises(InputError, match="no row"):
        list(Corpus.of(["a text"], options))
    for bad in ("", "no column", "{q", "{q.__class__}"[:0] + "{}", "{q!r}", "{q:>5}"):
        with pytest.raises(InputError, match="template"):
            CorpusOptions(template=bad)
    with pytest.raises(InputError, match="leave column"):
        CorpusOptions(column="q", template="{q}")


def test_extract_joins_columns(tmp_path: Path, capsys) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps({"q": f"Wo ist {i}?", "a": "Da."}) + "\n" for i in range(4)))
    argv = ["extract", str(table), "--template", r"{q}\n{a}", "-o", str(tmp_path / "s"), "--layers", "5"]
    assert main(argv) == 0, capsys.readouterr().err
    with FeatureStore(tmp_path / "s") as store:
        texts = Dataset.from_store(store, 5, texts=True).texts
        metas = store.sql("SELECT meta FROM documents ORDER BY document")["meta"].to_pylist()
    assert texts is not None
    assert texts[1] == "Wo ist 1?\nDa."
    assert json.loads(metas[1]) == {"q": "Wo ist 1?", "a": "Da."}

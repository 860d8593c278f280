"""`extract` and `store` as commands."""

from __future__ import annotations

import json

import pytest
import stores
import tiny

from qwen_scope.cli import main


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_extract_and_ask(capsys, tmp_path) -> None:
    corpus, store = tmp_path / "c.jsonl", str(tmp_path / "s")
    corpus.write_text("".join(json.dumps(row) + "\n" for row in stores.ROWS) + "{broken\n")
    where = ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu"]
    argv = ["extract", str(corpus), "-o", store, *where, "--row", "40", "--window", "100", "--pool", "mean,last"]
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    made = json.loads(out)
    assert (made["documents"], made["unreadable"]) == (17, {"bad JSON": 1})
    assert [row["layer"] for row in made["layers"]] == [0, 2]
    code, out, _ = run(capsys, "store", store, "--verify")
    assert code == 0
    assert "17 documents" in out
    assert "bad JSON" in out
    code, out, _ = run(capsys, "store", store, "--layer", "2", "-n", "1", "--json")
    busiest = json.loads(out)[0]
    code, out, _ = run(capsys, "store", store, "--layer", "2", "-f", str(busiest["feature"]), "-n", "3", "--json")
    about = json.loads(out)
    assert about["maximum"] == pytest.approx(busiest["maximum"])
    assert len(about["contexts"]) == 3
    assert sum(about["histogram"]["counts"]) == about["tokens"]
    for how in ("top", "random", "quantiles"):
        code, out, _ = run(capsys, "store", store, "--layer", "0", "-f", "3", "--how", how)
        assert code == 0
        assert "Layer 0, feature 3" in out
    code, out, _ = run(capsys, "store", store, "--sql", "SELECT count(*) AS n FROM documents", "--json")
    assert json.loads(out) == [{"n": 17}]


@pytest.mark.slow
def test_mistakes_end_in_one_sentence(capsys, tmp_path) -> None:
    folder = tmp_path / "s"
    stores.make(folder).close()
    for argv, sentence in (
        (["store", str(tmp_path / "none")], "there is no store"),
        (["store", str(tmp_path)], "has no manifest.json"),
        (["store", str(folder), "-f", "3"], "name one with --layer"),
        (["store", str(folder), "--layer", "1"], "has no layer 1"),
        (["store", str(folder), "--layer", "0", "-f", "99"], "features 0 to 95"),
        (["store", str(folder), "--layer", "0", "-f", "3", "--how", "best"], "--how is one of"),
        (["store", str(folder), "--sql", "SELECT"], "DuckDB refuses"),
        (["extract", str(tmp_path / "none.txt"), "-o", str(tmp_path / "t")], "no file, folder or dataset"),
        (["extract", "lab", "-o", str(tmp_path / "t"), "--pool", "median"], "pooled by mean or last"),
    ):
        code, _, err = run(capsys, *argv)
        assert code == 2, argv
        assert sentence in err
        assert err.count("\n") == 1

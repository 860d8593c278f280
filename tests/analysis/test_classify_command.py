"""`classify fit`, `predict` and `distil` on the tiny model: a feature of a script is easy to find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from qwen_scope.analysis import Rule
from qwen_scope.cli import main
from qwen_scope.text import CorpusOptions

WHERE = ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu"]


def corpus(path: Path, texts: list[str], **more) -> str:
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    east = [f"车站在哪里 {i}" for i in range(12)]
    west = [f"hello friend {i}" for i in range(12)]
    corpus(tmp_path / "east.jsonl", east, east=True)
    corpus(tmp_path / "west.jsonl", west, east="0")
    both = (tmp_path / "east.jsonl").read_text() + (tmp_path / "west.jsonl").read_text()
    (tmp_path / "both.jsonl").write_text(both)
    return tmp_path


def test_a_weighted_rule_is_fitted_and_asked_by_the_same_commands(folder: Path, capsys) -> None:
    rule, east, west, both = (str(folder / n) for n in ("rule.json", "east.jsonl", "west.jsonl", "both.jsonl"))
    assert main(["classify", "fit", east, west, "-r", rule, "--weighted", "--top", "4", *WHERE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["results"])[:2] == ["4 weighted", "rule of 2"]
    assert found["results"]["4 weighted"]["f1"]["estimate"] == 1
    loaded = Rule.load(rule)
    assert (loaded.weighted, len(loaded.features)) == (True, 4)
    assert main(["classify", "predict", rule, both, "-o", str(folder / "out.jsonl"), *WHERE]) == 0
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [a["label"] for a in answers] == [a["score"] > 0 for a in answers] == [True] * 12 + [False] * 12
    weights = {one.feature: one.weight for one in loaded.features}
    assert all(weights[one["feature"]] > 0 for answer in answers for one in answer["because"])
    capsys.readouterr()
    assert main(["classify", "fit", east, west, "--weighted", "--several", "2", *WHERE]) == 2
    assert "those of several are joined by OR" in capsys.readouterr().err


def test_fit_predict_distil(folder: Path, capsys) -> None:
    rule, east, west, both = (str(folder / n) for n in ("rule.json", "east.jsonl", "west.jsonl", "both.jsonl"))
    assert main(["classify", "fit", east, west, "-r", rule, "--top", "1", *WHERE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["results"]["rule of 1"]["f1"]["estimate"] == 1
    assert {"TF-IDF", "rule of 1", "16 weighted"} < set(found["results"])
    assert not found["noise_labels"]
    assert main(["classify", "predict", rule, both, "-o", str(folder / "out.jsonl"), *WHERE]) == 0
    capsys.readouterr()
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [a["label"] for a in answers] == [True] * 12 + [False] * 12
    for answer in answers[:12]:
        evidence = answer["because"][0]
        feature = Rule.load(rule).features[0]
        assert (evidence["layer"], evidence["feature"]) == (feature.layer, feature.feature)
        assert evidence["value"] > 0
        assert evidence["token"]
    student = str(folder / "student.json")
    assert main(["classify", "distil", rule, both, "-s", student, "--truth", "east", *WHERE, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["agreement"] == 1
    assert measured["lost_f1"] == 0
    assert main(["classify", "predict", student, both]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["label"] for line in lines] == [True] * 12 + [False] * 12


def test_predictions_equal_the_rule_on_a_store(folder: Path, capsys) -> None:
    from qwen_scope.analysis import Dataset, fit_rule, labelled
    from qwen_scope.cli.classify import label_window
    from qwen_scope.scope import ExtractOptions, load_scope
    from qwen_scope.text import Counted, Document

    scope = load_scope(tiny.folder() / "model", tiny.folder() / "sae", device="cpu")
    # A rule that says nothing of it counts every token.
    how, reading = ExtractOptions(counted=Counted.everything()), CorpusOptions(unit="line")
    east, west = (
        scope.firings(str(folder / name), [0, 2], how, name=name, reading=reading)
        for name in ("east.jsonl", "west.jsonl")
    )
    seeds, _ = labelled(east, west)
    rule = fit_rule(seeds, several=2)
    data = seeds.layers[0]
    assert isinstance(data, Dataset)
    texts = list(data.texts or ())
    streamed = list(label_window(rule, scope, [Document(text) for text in texts], [{} for _ in texts]))
    assert [a["label"] for a in streamed] == rule.decide(seeds.layers).tolist()
    assert [a["score"] for a in streamed] == pytest.approx(rule.scores(seeds.layers).tolist(), rel=1e-4)
    for i, answer in enumerate(streamed):
        assert [(e["layer"], e["feature"], e["position"]) for e in answer["because"]] == [
            (e.layer, e.feature, e.position) for e in rule.trace(seeds.layers, i)
        ]


def test_mistakes_end_in_one_sentence(folder: Path, capsys) -> None:
    east, west = str(folder / "east.jsonl"), str(folder / "west.jsonl")
    rule = folder / "rule.json"
    assert main(["classify", "fit", east, west, "-r", str(rule), *WHERE]) == 0
    other = json.loads(rule.read_text())
    other["features"][0]["sae"] = "another"
    (folder / "other.json").write_text(json.dumps(other))
    (folder / "empty.jsonl").write_text("")
    capsys.readouterr()
    for argv, sentence in (
        (["fit", east, west, "--test-positive", east, *WHERE], "give both --test-positive and --test-negative"),
        (["fit", east, str(folder / "empty.jsonl"), *WHERE], "no document to extract"),
        (["fit", east, west, "--fpr", "2", *WHERE], "false-positive rate"),
        (["fit", east, west, "--several", "9", *WHERE], "number of layers"),
        (["predict", str(folder / "none.json"), east, *WHERE], "there is no file"),
        (["predict", east, east, *WHERE], "not JSON"),
        (["predict", str(folder / "other.json"), east, *WHERE], "about the SAE another"),
        (["predict", str(rule), str(folder / "empty.jsonl"), *WHERE], "no document to label"),
        (["distil", str(rule), east, "-s", str(folder / "s.json"), *WHERE], "both classes"),
        (["distil", str(rule), east, "-s", str(folder / "s.json"), "--truth", "x", *WHERE], "not true or false"),
    ):
        assert main(["classify", *argv]) == 2, argv
        err = capsys.readouterr().err
        assert sentence in err
    assert not (folder / "s.json").exists()

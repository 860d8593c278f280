"""What one language teaches about another: against the formulas, and the command on the tiny model and the lab."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny
from made import dataset

from qwen_scope.analysis import Labelled, Language, across
from qwen_scope.cli import main
from qwen_scope.errors import InputError

WHERE = ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu"]


def language(name: str, marks: set[int], own: int, seed: int, n: int = 24) -> Language:
    """Positive documents fire `marks`, all documents of a language `own`; residuals and texts tell the class, too."""
    parts = []
    for part in range(2):
        rng = np.random.default_rng([seed, part])
        labels = np.arange(n) % 2 == 0
        sets = [{own, 20 + int(rng.integers(10))} | (marks if yes else set()) for yes in labels]
        texts = tuple(f"{name} {'bad' if yes else 'good'} {i}" for i, yes in enumerate(labels))
        data = dataset(sets, width=32, name=name + str(part), texts=texts)
        x = rng.normal(size=(n, 4)).astype(np.float32)
        x[:, 0] += np.where(labels, 6, -6)
        parts.append((Labelled({0: data}, labels), {0: x}))
    return Language(parts[0][0], parts[1][0], parts[0][1], parts[1][1])


def test_rules_go_where_their_feature_fires() -> None:
    """A and b share the feature 1; c has its own, so nothing goes between it and them."""
    languages = {"a": language("a", {1}, 10, 0), "b": language("b", {1}, 11, 1), "c": language("c", {2}, 12, 2)}
    found = across(languages, top=1, shared=1)
    f1 = np.array([[cell["estimate"] for cell in row] for row in found.data["f1"]["rule"]])
    np.testing.assert_array_equal(f1, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(found.data["jaccard"]["0"], f1)
    assert found.data["mean_f1"]["rule"] == {"own": 1.0, "others": pytest.approx(1 / 3)}
    assert found.data["mean_jaccard"]["0"]["found"] == pytest.approx(1 / 3)
    assert found.data["mean_jaccard"]["0"]["shuffled"] < 0.3
    for said in ("logistic", "means", "TF-IDF"):
        assert found.data["mean_f1"][said]["others"] > 0.9, "the residual and the word tell the class in every language"
    positive = found.data["mean_f1"]["call everything positive"]
    assert positive["own"] == positive["others"] == pytest.approx(2 / 3)
    assert not found.notes
    names = {"a", "b", "c"}
    assert all(set(figure.rows) == set(figure.columns) == names for figure in found.figures)
    assert len(found.figures) == 5


def test_noise_is_called_noise() -> None:
    rng = np.random.default_rng(5)
    languages = {}
    for name in "ab":
        one = language(name, set(), 10, 3)
        mixed = Labelled(one.seeds.layers, rng.permutation(one.seeds.labels))
        languages[name] = Language(mixed, one.test, one.pooled, one.test_pooled)
    found = across(languages, top=1)
    assert [note.split(" look")[0] for note in found.notes] == ["the labels of a", "the labels of b"]


def test_what_makes_no_sense_is_refused() -> None:
    one = language("a", {1}, 10, 0)
    with pytest.raises(InputError, match="at least two languages, not 1"):
        across({"a": one})
    bare = Language(
        *(Labelled({0: dataset([{1}, {2}] * 4)}, np.arange(8) % 2 == 0) for _ in range(2)),
        {0: np.eye(8, dtype=np.float32)},
        {0: np.eye(8, dtype=np.float32)},
    )
    with pytest.raises(InputError, match="with their texts"):
        across({"a": bare, "b": bare})
    with pytest.raises(InputError, match="number of features"):
        across({"a": one, "b": one}, top=99)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = []
    for name, bad, good in (("zh", "车站在哪里", "你好"), ("en", "车站 where is it", "hello friend")):
        rows += [{"text": f"{bad} {i}", "tongue": name, "rude": True} for i in range(8)]
        rows += [{"text": f"{good} {i}", "tongue": name, "rude": False} for i in range(8)]
    rows += [{"text": "x too", "tongue": "fr", "rude": True}, {"text": "y too", "rude": True}]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "all.jsonl"


class Names(HTMLParser):
    """Which elements a page has, and where they point."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_command_prints_and_draws(corpus: Path, tmp_path: Path, capsys) -> None:
    words = ["classify", "transfer", str(corpus), "--positive", "rude=true", "--groups", "tongue", "--top", "1", *WHERE]
    assert main([*words, "--json", "-o", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["languages"] == ["en", "zh"]
    assert found["documents"]["zh"] == {"seeds": 10, "test": 6}
    assert len(found["f1"]["rule"]) == 2
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    seen = Names()
    seen.feed(page)
    assert "svg" in seen.names
    assert "script" not in seen.names
    assert not seen.links
    assert "F1 from row to column: rule" in page
    images = sorted(tmp_path.glob("out/figure*.png"))
    assert len(images) == 5
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in images)
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 documents without tongue or rude are left out" in shown
    assert "fr is left out" in shown


@pytest.mark.slow
def test_the_command_knows_the_lab(capsys) -> None:
    words = ["classify", "transfer", "lab", "--positive", "register=rude", "--documents", "6", "--layer", "3", "--json"]
    assert main([*words, "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["languages"]) == 9
    assert found["documents"]["de"] == {"seeds": 8, "test": 4}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["all.jsonl", "--positive", "rude"], "COLUMN=VALUE"),
        (["all.jsonl", "--positive", "polite=true", "--groups", "tongue"], "a column 'polite'"),
        (["all.jsonl", "--positive", "rude=true"], "a column 'language'"),
        (["all.jsonl", "--positive", "rude=maybe", "--groups", "tongue"], "transfer takes at least two"),
        (["none.jsonl", "--positive", "rude=true"], "none.jsonl"),
        (["lab", "--positive", "register=rde"], "did you mean 'rude'"),
        (["lab", "--positive", "kind=talk"], "registers in languages"),
    ],
)
def test_mistakes_end_in_one_sentence(words: list[str], said: str, corpus: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(corpus.parent)
    assert main(["classify", "transfer", *words, *WHERE]) == 2
    # A bar may stand above it: some mistakes show only once the documents are read.
    assert said in capsys.readouterr().err.splitlines()[-1]

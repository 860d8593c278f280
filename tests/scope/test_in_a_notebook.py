"""What a notebook shows and takes: escaped HTML with the page's marks, short reprs, frames, one or many of anything."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars
import pyarrow as pa
import pytest

from qwen_scope import FeatureStore, Intervention, Scope, load_scope
from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.features import (
    Budget,
    Condition,
    Dose,
    Evidence,
    FeaturePage,
    Rules,
    SideEffects,
    Sweep,
    Verdict,
    feature_page,
    find,
    match,
)
from qwen_scope.report import HasFrames, Table
from qwen_scope.score import FIGURES, Scoreboard, ScoreRun
from qwen_scope.score.board import WITH, WITHOUT
from qwen_scope.score.controls import TRAINED
from qwen_scope.stats import Interval
from qwen_scope.steer import Decoding
from qwen_scope.trust import Card, Trust

HOSTILE = "<script>alert(1)</script> & Wie geht es?"


@pytest.fixture(scope="module")
def scope() -> Scope:
    return load_scope("lab")


@pytest.fixture(scope="module")
def store(scope: Scope, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return scope.extract([HOSTILE, "Guten Tag."], tmp_path_factory.mktemp("s") / "<b>", layers="5")


class Reader(HTMLParser):
    """Text and elements of a piece of HTML; raises where they do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.classes: set[str] = set()
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.names.add(tag)
        self.classes |= {c for name, value in attrs if name == "class" for c in value.split()}
        if tag not in ("br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(value: object) -> Reader:
    html = value._repr_html_()  # pyright: ignore[reportAttributeAccessIssue]
    found = Reader(html)
    assert "script" not in found.names
    assert "qwen-scope" in found.classes
    assert "\nbody" not in html  # no rule reaches the notebook around it
    assert 0 < len(repr(value)) < 160
    assert "\n" not in repr(value)
    return found


def test_everything_shows_itself_escaped_and_short(scope: Scope, store: FeatureStore) -> None:
    seen = scope.features(HOSTILE, layers=5)
    found = shown(seen)
    assert HOSTILE.replace(" ", "") in found.text.replace(" ", "")
    assert {"s4", "context", "out"} <= found.classes
    strongest = seen.strongest(0, 5, 1)[0]
    assert f"5/{strongest.feature}" in found.text
    assert "lab" in shown(scope).text
    assert "rate_a" in shown(scope.compare("Hallo du", HOSTILE, 5)).text
    said = scope.generate(HOSTILE, decoding=Decoding(max_new_tokens=4), candidates=0)
    assert said.text.strip() in shown(said).text
    assert "<b>" in shown(store).text
    some = [f"Wo ist Haus {i}?" for i in range(4)], [f"Where is house {i}?" for i in range(4)]
    assert "significant" in shown(find(scope, *some, 5)).text
    page = feature_page(5, strongest.feature, store=store, scope=scope)
    assert "Strongest contexts" in shown(page).text
    assert "<i>" in shown(Table("<i>", ("<b>",), [["</td>"]])).text


def test_frames_are_one_table_three_times(scope: Scope, store: FeatureStore) -> None:
    seen = scope.features(["Wie geht es?", "Hallo"], layers=[4, 5])
    active = sum(int((acts.values > 0).sum()) for acts in seen.acts.values())
    for value, rows in ((seen, active), (scope.compare("Hallo", "Hello", [5], n=3), 3), (store, 1)):
        table = value.to_arrow()
        assert isinstance(table, pa.Table)
        assert table.num_rows == rows
        assert value.to_polars().equals(polars.from_arrow(table))
    pandas = pytest.importorskip("pandas")
    frame = seen.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    names = ["text", "position", "layer", "feature"]
    text, position, layer, feature = (int(n) for n in frame.iloc[-1][names])
    assert float(seen.of(text, layer).select([feature])[position, 0]) == pytest.approx(frame.iloc[-1]["activation"])
    found = find(scope, ["a b", "c d", "e f", "g h"], ["1 2", "3 4", "5 6", "7 8"], 5).to_arrow()
    assert {"f1", "f1_low", "f1_high"} <= set(found.column_names)


def test_what_was_measured_is_a_frame_too(scope: Scope, tmp_path: Path) -> None:
    some = Interval(0.5, 0.25, 0.75, 4)
    doses = (Dose(0.0, some, 9.0, 0.1, 0.0, True, "a"), Dose(0.5, some, 10.0, 0.2, 0.3, False, "<b>"))
    sweep = Sweep(doses, 0.5, 9.0, Budget(), False, ())
    found = pl(sweep)
    assert found["amount"].to_list() == [0.0, 0.5]
    assert found["proposed"].to_list() == [False, True]
    assert found["effect_low"].to_list() == [0.25, 0.25]
    assert "proposed: 0.5" in shown(sweep).text
    conditions = (Condition("the feature", some, None, 0.0, "x"), Condition("unsteered", some, 3.0, 0.0, "y"))
    evidence = Evidence(some, some, 1, some, some, some, some, some, some)
    verdict = Verdict("causal", (), conditions, (), SideEffects(some, some, some, ()), evidence, Rules(), ())
    assert pl(verdict)["name"].to_list() == ["the feature", "unsteered"]
    assert "Verdict: causal" in shown(verdict).text
    card = Card(
        FeaturePage(4, 3, "g", "m"), {}, {}, None, None, None, None, None, (), None, (), (), (), (), (), (),
        Trust("shaky", (("it fires", True), ("it has a name", None))),
    )  # fmt: skip
    assert pl(card)["held"].to_list() == [True, None]
    assert "shaky: layer 4, feature 3" in shown(card).text
    both = match(scope.saes[4], scope.saes[5], features=[1, 2, 3])
    assert pl(both)["feature"].to_list() == [1, 2, 3]
    assert pl(both)["cosine"].to_list() == both.cosine.score.tolist()
    figures = dict.fromkeys(FIGURES, 0.5)
    cells = {4: {arm: {s: {**figures, "kl": kl} for s in (WITH, WITHOUT)} for arm, kl in ((TRAINED, 0.1), ("x", 0.4))}}
    board = pl(Scoreboard(ScoreRun("lab", "lab", tmp_path), cells))
    assert len(board) == 2 * len(FIGURES)
    row = board.row(by_predicate=(polars.col("figure") == "kl") & (polars.col("read") == WITH), named=True)
    assert (row["value"], row["control_value"], row["gain"]) == (0.1, 0.4, pytest.approx(0.3))


def pl(value: HasFrames) -> polars.DataFrame:
    """A frame of polars, equal to that of Arrow."""
    assert value.to_polars().equals(polars.from_arrow(value.to_arrow()))
    return value.to_polars()


@pytest.mark.parametrize("name", ["pandas", "polars"])
def test_a_missing_package_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_scope.errors.find_spec", lambda package: None)
    with pytest.raises(NotFoundError, match=f"needs the package {name}; install it with"):
        getattr(Table("t", ("a",), [[1]]), f"to_{name}")()


def test_one_or_many_in_whatever_holds_them(scope: Scope) -> None:
    texts = ["Wie geht es?", "Hallo"]
    expected = scope.features(texts, [4, 5]).to_arrow()
    several = [tuple(texts), np.array(texts), polars.Series(texts), pa.array(texts), iter(texts)]
    if pandas := sys.modules.get("pandas"):
        several.append(pandas.Series(texts, index=[7, 3]))
    for some, layers in zip(several, ["4,5", np.array([5, 4]), range(4, 6), "4-5", (4, "5"), [4, 5]], strict=False):
        assert scope.features(some, layers).to_arrow() == expected
    assert scope.features("Hallo", np.int64(5)).layers == [5]
    assert scope.features("Hallo", "layers.5.resid_post").layers == [5]
    assert scope.features("Hallo", "all").layers == scope.layers
    message = [{"role": "user", "content": "Hallo"}]
    assert scope.features(message, 5, chat="default").texts == scope.features([message], 5, chat="default").texts
    more = Intervention.add(layer=5, feature=678, amount=0.3, unit="resid_norm")
    short = Decoding(max_new_tokens=3)
    one = scope.generate("Hallo", more, decoding=short)
    assert one == scope.generate(np.array(["Hallo"]), [more], decoding=short)[0]
    for bad in (3, None, b"x", {"text": "x"}, ["x", None], ["x", float("nan")]):
        with pytest.raises(InputError, match="text"):
            scope.features(bad)
    for bad in (1.5, [True], "x", [None], object()):
        with pytest.raises(InputError):
            scope.features("x", bad)


def test_a_store_is_extracted_from_a_series(scope: Scope, tmp_path: Path) -> None:
    with scope.extract(polars.Series(["Hallo du", "Wer da"]), tmp_path / "s", layers=5) as store:
        assert store.manifest.documents == 2

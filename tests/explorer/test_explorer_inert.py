"""Whatever a name, a file or an error holds, the page shows it inertly and without a folder of this machine."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from explored import HOSTILE, LAYER, answer, served

from qwen_scope.explorer import AppState
from qwen_scope.explorer.access.discreet import discreet
from qwen_scope.explorer.look import explore as explore_view
from qwen_scope.explorer.look import feature as feature_view
from qwen_scope.explorer.look import steer as steer_view
from qwen_scope.explorer.look.components import Named, notice
from qwen_scope.explorer.page import header
from qwen_scope.explorer.tabs.datasets import analysed, result_panel, trace_panel
from qwen_scope.features import Label, Notes, make_label
from qwen_scope.scope import model_source
from qwen_scope.stats import Interval


@pytest.mark.slow
def test_answers_and_errors_name_no_folder(state: AppState, stores: dict[str, Path], tmp_path: Path, url: str) -> None:
    with state.store("german") as store:
        good = Interval(0.9, 0.8, 1.0, 20)
        label = Label("Words", good, good, "/home/someone/models/writer", "tokens")
        Notes(store).add(make_label(LAYER, 9, store.layer(LAYER).fingerprint, label))
    for store in (None, "german"):
        kind, told = answer(url, "feature", [LAYER, 9, store])
        assert kind == "complete"
        assert told[0]["store"] == store
        assert not re.search(r"(?<!<)/(home|tmp|work|usr|var|root)/", json.dumps(told))
        assert str(stores["german"].parent) not in json.dumps(told)
        assert model_source("lab") not in json.dumps(told)
    assert told[0]["label"]["source"] == "writer"

    shutil.copytree(stores["german"], tmp_path / "a store")
    own = AppState(state.scope, {"broken": tmp_path / "a store"})
    with served(own) as broken:
        (tmp_path / "a store" / "manifest.json").write_text("{")
        for endpoint, data in (("feature", [LAYER, 1, "broken"]), ("analyze", ["redundancy", ["broken"], LAYER])):
            kind, told = answer(broken, endpoint, data)
            assert kind == "error"
            assert told["error"]
            assert str(tmp_path) not in told["error"]
        kind, told = answer(broken, "features", ["Hello", 77])
        assert "/" not in told["error"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("there is no file '/etc/passwd'", "there is no file 'passwd'"),
        ("/srv/a b/store has no layer 3", "store has no layer 3"),
        ("feature 4/1028 and 1/2, on https://example.org/a/b", "feature 4/1028 and 1/2, on https://example.org/a/b"),
        ("at /tmp/gradio/0a1b/rule.json: no", "at rule.json: no"),
        (r"C:\Users\me\x.json is no rule", "x.json is no rule"),
        ("one of and/or", "one of and/or"),
        ("/", "/"),
    ],
)
def test_paths_are_cut_to_their_last_part(text: str, shown: str) -> None:
    assert discreet(text, {"/srv/a b/store": "store"}) == shown


@pytest.mark.slow
def test_an_unforeseen_error_is_one_sentence_too(state: AppState, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    own = AppState(state.scope)

    def broken(*_: Any) -> Any:
        raise RuntimeError(f"CUDA is out of memory in {__file__}")

    monkeypatch.setattr(own, "seen", broken)
    with served(own) as url:
        kind, told = answer(url, "features", ["Hello", LAYER])
    assert kind == "error"
    assert "could not be answered" in told["error"]
    assert __file__ not in json.dumps(told)
    assert "CUDA is out of memory" in capfd.readouterr().err


def inert(markup: str) -> None:
    """Nothing of the hostile text has become an element, an attribute or a template."""
    assert "&lt;script&gt;" in markup or "&lt;img" in markup or "script" not in markup
    for alive in ("<script", "<img", "onerror='", 'onerror="', "${", "{{", "`b`"):
        assert alive not in markup, alive
    assert not re.search(r"<[^>]*\sonerror", re.sub(r'"[^"]*"', "", markup))


def test_hostile_names_labels_and_files_are_shown_inertly(state: AppState) -> None:
    """Escaping holds wherever a text from outside meets the page."""
    own = AppState(state.scope, model_name=HOSTILE, trained_from=HOSTILE)
    own.sae_name = HOSTILE
    inert(header(own))
    inert(notice(f"{HOSTILE} is no store"))

    def label(*_: int) -> Named:
        return Named(HOSTILE, 0.9)

    seen = state.seen(HOSTILE, LAYER)
    reading = explore_view.Reading(HOSTILE, "plain", LAYER).with_default_choice(seen)
    inert(explore_view.tokens_panel(seen, reading, label))
    inert(explore_view.token_features_panel(seen, reading, label))
    inert(explore_view.text_features_panel(seen, reading, label))
    inert(explore_view.heat_panel(seen, replace(reading, only_counted=False), label))
    inert(explore_view.token_depth_panel({LAYER: seen}, reading, label))

    good = Interval(0.9, 0.8, 1.0, 20)
    page = state.feature_page(LAYER, 7, "german")
    named = replace(
        page, label=Label(HOSTILE, good, good, HOSTILE, HOSTILE), verdict={"outcome": HOSTILE, "reasons": [HOSTILE]},
        group=HOSTILE, model=HOSTILE, store=HOSTILE,
    )  # fmt: skip
    for panel in (feature_view.title_panel(named, f"?feature={HOSTILE}"), feature_view.facts_panel(named),
                  feature_view.notes_panel(named), feature_view.neighbours_panel(named, label)):  # fmt: skip
        inert(panel)
    row = {"layer": HOSTILE, "feature": HOSTILE, "op": "add", "amount": HOSTILE, "unit": "raw", "where": HOSTILE}
    inert(steer_view.list_panel([row, row], 0))
    inert(steer_view.growing_panel("Original", HOSTILE, HOSTILE))


def test_hostile_names_in_analyses_and_rules_are_shown_inertly(state: AppState, stores: dict[str, Path]) -> None:
    own = AppState(state.scope, {HOSTILE.replace("/", "|"): stores["german"], "<img src=y>": stores["english"]})
    for name in ("overlap", "redundancy", "drift", "subset"):
        inert(result_panel(HOSTILE, analysed(own, list(own.stores), name, LAYER), 1.0, own))
    rule = type("Rule", (), {"name": HOSTILE})()
    inert(trace_panel(own, rule, HOSTILE, [HOSTILE], []))  # pyright: ignore[reportArgumentType]

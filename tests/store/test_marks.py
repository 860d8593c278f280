"""Contexts say which of their tokens do not count, and every view of them marks those."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
import pytest
import stores

from qwen_scope.cli import main
from qwen_scope.explorer.look.feature import contexts_panel
from qwen_scope.features import feature_html, feature_page
from qwen_scope.model import HookPoint, capture
from qwen_scope.report import marks_note, shaded
from qwen_scope.store import Context, FeatureStore
from qwen_scope.text import Counted

LAYER = 2
POINT = HookPoint(LAYER)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeatureStore]:
    """First tokens are left out, and a tenth of the others as sinks of one layer."""
    scope = stores.scope()
    rows = [scope.tokenize([text], truncate=True).input_ids for text in stores.TEXTS[:6]]
    norms = np.concatenate([capture(scope.model, ids, [POINT])[POINT][0].norm(dim=-1).numpy() for ids in rows])
    counted = Counted(norms={str(POINT): float(np.quantile(norms, 0.9)), "layers.0.resid_post": None})
    with stores.make(tmp_path_factory.mktemp("marks") / "store", counted=counted) as made:
        yield made


@pytest.fixture(scope="module")
def feature(store: FeatureStore) -> int:
    return int(store.stats(LAYER).sort_by([("tokens", "descending")])["feature"][0].as_py())


def test_contexts_know_what_the_table_of_masked_tokens_says(store: FeatureStore, feature: int) -> None:
    masked = {
        (row["document"], row["position"]): row["reason"]
        for row in store.sql("SELECT * FROM masked WHERE layer = ?", [LAYER]).to_pylist()
    }
    assert set(masked.values()) == {"first", "sink"}
    found = store.contexts(LAYER, feature, 1000, before=9, after=9)
    assert {reason for context in found for reason in context.left_out} == {"", "first", "sink"}
    for context in found:
        places = [(context.document, context.start + i) for i in range(len(context.tokens))]
        assert context.left_out == tuple(masked.get(place, "") for place in places)
    for context in store.silent(LAYER, feature, 5):
        places = [(context.document, context.start + i) for i in range(len(context.tokens))]
        assert context.left_out == tuple(masked.get(place, "") for place in places)


@pytest.mark.slow
def test_every_view_marks_them(store: FeatureStore, feature: int, capsys: pytest.CaptureFixture[str]) -> None:
    page = feature_page(LAYER, feature, store=store, contexts=8)
    shown = (*page.strongest, *page.spread)
    marked = sum(reason != "" for context in shown for reason in context.left_out)
    assert marked
    html = feature_html(page)
    tips = re.findall(r'<span class="out" title="left out: (first|sink)">', html)
    assert len(tips) == marked
    assert "A dashed frame marks tokens that do not count: " in html
    words = [str(store.folder), "--feature", f"{LAYER}/{feature}", "-n", "8"]
    for command in (["show", *words, "--no-model"], ["store", *words]):
        assert main(command) == 0
        text = capsys.readouterr().out
        assert "⟨ ⟩ marks tokens that do not count: first" in text
        assert text.count("⟨") > 1
    assert main(["show", *words, "--no-model", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["strongest"]
    assert [tuple(one["left_out"]) for one in told] == [context.left_out for context in page.strongest]
    panel = contexts_panel("Strongest", "", page.strongest, page.maximum)
    assert panel.count("qs-left-out") == sum(reason != "" for one in page.strongest for reason in one.left_out)
    assert "A dashed frame marks tokens that do not count: " in panel


def test_a_context_says_its_phase() -> None:
    assert Context(4, 7, 1.0, 7, ("a",), (1.0,), "thinking").place == "document 4, position 7 (thinking)"
    assert Context(4, 7, 1.0, 7, ("a",), (1.0,)).place == "document 4, position 7"
    thinking = Context(4, 7, 1.0, 7, ("a",), (1.0,), "thinking")
    assert "thinking: " in contexts_panel("Strongest", "", [thinking], 1.0)


def test_marks_stand_in_plain_text_too() -> None:
    reasons = ["first", "", "sink"]
    assert shaded(["a", "b", "c"], [0.0, 2.0, 1.0], left_out=reasons).plain == "⟨a⟩b⟨c⟩"
    assert marks_note(reasons) == "⟨ ⟩ marks tokens that do not count: first, sink"
    assert marks_note(["", ""]) is None

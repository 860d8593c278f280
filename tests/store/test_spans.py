"""Phases in a store: spans as the rendering tells them, and questions about some phases alone."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import stores

from qwen_scope.analysis import Dataset
from qwen_scope.cli import main
from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.store import TABLES, FeatureStore, LayerInfo, LayerRows, StoreWriter, Window
from qwen_scope.text import PHASES, tokenize

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello hello"},
    {"role": "assistant", "content": "<think>\nwell then\n</think>\n\nhello friend"},
    {"role": "user", "content": "and now"},
]
ROWS = [{"text": CHAT}, {"text": CHAT[:3]}, {"text": "a plain text"}]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Windows of 30 tokens end inside the conversations."""
    return stores.make(tmp_path_factory.mktemp("spans") / "s", ROWS, chat="thinking", window_tokens=30, row_tokens=None)


def told(store: FeatureStore) -> dict[int, list[tuple[int, str, str]]]:
    """Turn, role and phase of every token of every document, from the spans."""
    out: dict[int, list[tuple[int, str, str]]] = defaultdict(list)
    for row in store.sql("SELECT * FROM spans ORDER BY document, position").to_pylist():
        assert row["position"] == len(out[row["document"]]), "spans follow each other without a gap"
        out[row["document"]] += [(row["turn"], row["role"], row["phase"])] * row["tokens"]
    return out


def test_spans_are_those_of_the_rendering(store: FeatureStore) -> None:
    found = told(store)
    assert len(found) == len(ROWS)
    for i, row in enumerate(ROWS):
        tokens = tokenize(stores.scope().tokenizer, [row["text"]], max_length=None, chat="thinking")
        turns, phases = tokens.phases(0)
        assert [(turn, phase) for turn, _, phase in found[i]] == [
            (int(turn), PHASES[p]) for turn, p in zip(turns, phases, strict=True)
        ]
        messages = row["text"] if isinstance(row["text"], list) else [{"role": "user"}]
        for turn, role, _ in found[i]:
            assert role == (messages[turn]["role"] if turn < len(messages) else "assistant")
        kept = store.sql("SELECT turn, phase FROM spans WHERE document = ? ORDER BY position", [i]).to_pylist()
        assert all(a != b for a, b in itertools.pairwise(kept)), "neighbours differ"
    assert {phase for rows in found.values() for _, _, phase in rows} >= {"system", "user", "thinking", "answer"}


def test_documents_outside_chats_are_text(tmp_path: Path) -> None:
    with stores.make(tmp_path / "s", ["hello hello", "x"], max_tokens=1) as store:
        assert (
            store.sql("SELECT * EXCLUDE (document) FROM spans").to_pylist()
            == [{"turn": 0, "role": "text", "phase": "text", "position": 0, "tokens": 1}] * 2
        )
        context = store.contexts(0, int(store.sql("SELECT feature FROM features LIMIT 1")["feature"][0].as_py()), 1)[0]
        assert context.phase == "text"


@pytest.mark.parametrize("reduction", ["any", "last", "mean", "max"])
def test_firing_in_some_phases_equals_the_dense_answer(store: FeatureStore, reduction: Any) -> None:
    found = told(store)
    for layer, phases in itertools.product(stores.LAYERS, (["thinking"], ["answer", "user"])):
        expected = {}
        for document, dense in enumerate(stores.from_store(store, layer)):
            here = [p for p, (_, _, phase) in enumerate(found[document]) if phase in phases]
            if not here:
                continue
            some = dense[here]
            values = {
                "any": (some > 0).any(0),
                "max": some.max(0),
                "last": some[-1],
                "mean": some.astype(float).mean(0),
            }
            for feature in np.flatnonzero(values[reduction]):
                expected[document, int(feature)] = float(values[reduction][feature])
        rows = store.firing(reduction, [layer], phases=phases).to_pylist()
        assert {(r["document"], r["feature"]): r["value"] for r in rows} == pytest.approx(expected, rel=1e-6)


def test_contexts_of_some_phases(store: FeatureStore) -> None:
    found = told(store)
    busy = store.sql("SELECT feature FROM stats WHERE layer = 0 ORDER BY tokens DESC LIMIT 1")["feature"][0].as_py()
    dense = stores.from_store(store, 0)
    for how in ("top", "random", "quantiles"):
        everything = store.contexts(0, busy, 1000, how=how, phases=["answer", "thinking"])
        wanted = {
            (d, p)
            for d, some in enumerate(dense)
            for p in np.flatnonzero(some[:, busy]).tolist()
            if found[d][p][2] in ("answer", "thinking")
        }
        assert wanted
        assert {(c.document, c.position) for c in everything} == wanted
        assert all(c.phase == found[c.document][c.position][2] for c in everything)
    each = store.contexts(0, busy, 1000, per_document=True, phases=["user"])
    assert len({c.document for c in each}) == len(each)
    for c in each:
        assert c.value == max(dense[c.document][p, busy] for p, one in enumerate(found[c.document]) if one[2] == "user")


def test_phases_that_cannot_be_asked_for(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a phase is one of .*, not 'answers'"):
        store.firing(phases=["answers"])
    with pytest.raises(InputError, match="name at least one phase"):
        store.contexts(0, 1, phases=[])
    with planted(tmp_path / "s", spans=False) as bare, pytest.raises(NotFoundError, match="does not tell the phases"):
        bare.firing(phases=["user"])


def planted(folder: Path, documents: int = 40, *, spans: bool = True) -> FeatureStore:
    """Documents of five tokens each of `user`, `thinking` and `answer`: feature 3 fires in thinking alone, 5 in answers
    alone, 7 in both and 9 everywhere."""
    fires = {3: [5, 6], 5: [10, 12], 7: [7, 11], 9: [0, 8, 14]}
    rows = sorted((d, p, f) for d in range(documents) for f, places in fires.items() for p in places)
    document, position, feature = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    made: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    for d in range(documents):
        where = {"source": "x", "row": d, "meta": "{}"}
        made["documents"].append({"document": d, "first_token": 15 * d, "tokens": 15, "cut": 0, **where})
        made["tokens"] += [{"document": d, "position": p, "token": 1, "text": " a"} for p in range(15)]
        for turn, (role, phase) in enumerate((("user", "user"), ("assistant", "thinking"), ("assistant", "answer"))):
            span = {"turn": min(turn, 1), "role": role, "phase": phase, "position": 5 * turn, "tokens": 5}
            made["spans"] += [{"document": d, **span}] if spans else []
    names = ("documents", "spans", "tokens", "masked", "unreadable", "residuals")
    tables = {name: pa.Table.from_pylist(made[name], schema=TABLES[name]) for name in names}
    value = np.linspace(1, 2, len(rows), dtype=np.float32)
    info = LayerInfo(3, "layers.3.resid_post", "group", "f" * 64, 24, 1, "topk")
    with StoreWriter(folder, "model", {"row_tokens": 15}, [info]) as writer:
        writer.add(Window({3: LayerRows(document, position, feature, value, 15 * documents)}, tables), {})
        writer.finish()
    return FeatureStore(folder)


@pytest.mark.slow
def test_what_fires_while_it_thinks_and_not_while_it_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command finds the planted feature: those that fire in both phases, or only in answers, are not among them."""
    planted(tmp_path / "s").close()
    argv = ["find", str(tmp_path / "s"), "--phase", "thinking", "--against", "answer", "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["layer"], one["feature"]) for one in found["found"] if one["significant"]] == [(3, 3)]
    assert found["significant"] == 1
    assert main([*argv[:3], "answer", "--against", "thinking", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["feature"] for one in found["found"] if one["significant"]] == [5]
    assert main(["store", str(tmp_path / "s"), "-f", "7", "--phase", "answer", "-n", "100", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["contexts"]
    assert {(one["position"], one["phase"]) for one in shown} == {(11, "answer")}
    assert main(["store", str(tmp_path / "s"), "-f", "7", "-n", "1"]) == 0
    assert "position 11 (answer)" in capsys.readouterr().out  # values rise with the rows, so the last is the strongest
    for wrong in (["--phase", "thinking"], ["--phase", "thinking", "--against", "thinking"], ["--against", "answer"]):
        assert main(["find", str(tmp_path / "s"), *wrong]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert main(["find", str(tmp_path / "s"), "--phase", "thought", "--against", "answer"]) == 2


def test_drift_of_a_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        planted(tmp_path / name).close()
    with FeatureStore(tmp_path / "a") as store:
        data = [Dataset.from_store(store, 3, "max", phases=[phase]) for phase in ("thinking", "answer")]
    assert [np.flatnonzero(one.counts()).tolist() for one in data] == [[3, 7, 9], [5, 7, 9]]
    argv = ["analyze", "drift", str(tmp_path / "a"), str(tmp_path / "b"), "--phase", "answer", "--json"]
    assert main(argv) == 0

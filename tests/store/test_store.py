"""What a store answers, held against the same thing computed densely in numpy."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stores
import tiny
import torch

from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.model import HookPoint, capture
from qwen_scope.sae import Identity
from qwen_scope.scope import ExtractOptions, extract
from qwen_scope.store import FeatureStore, Manifest
from qwen_scope.store.sql import firing_query
from qwen_scope.text import Corpus, Counted


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    return stores.make(tmp_path_factory.mktemp("store") / "s")


@pytest.fixture(scope="module", params=stores.LAYERS)
def layer(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def truth(store, layer) -> list[np.ndarray]:
    """Per document `(tokens, d_sae)`; test_extract holds it against the scope."""
    return stores.from_store(store, layer)


@pytest.fixture(scope="module")
def busiest(store, layer) -> int:
    return int(store.stats(layer)["tokens"].to_numpy().argmax())


def test_statistics_equal_the_dense_ones_exactly(store, layer, truth) -> None:
    every = np.concatenate(truth).astype(np.float64)
    stats = {name: column.to_numpy() for name, column in zip(*_columns(store.stats(layer)), strict=True)}
    assert stats["feature"].tolist() == list(range(tiny.D_SAE))
    np.testing.assert_array_equal(stats["tokens"], (every > 0).sum(0))
    np.testing.assert_array_equal(stats["documents"], sum((some > 0).any(0).astype(int) for some in truth))
    np.testing.assert_array_equal(stats["sum"], every.sum(0))
    np.testing.assert_array_equal(stats["maximum"], every.max(0))
    np.testing.assert_array_equal(stats["minimum"], _least(every))
    np.testing.assert_array_equal(stats["frequency"], (every > 0).mean(0))
    np.testing.assert_array_equal(stats["mean"], every.sum(0) / len(every))
    for feature in range(0, tiny.D_SAE, 7):
        one = store.feature(layer, feature)
        assert (one.tokens, one.documents) == (stats["tokens"][feature], stats["documents"][feature])
        active = every[:, feature][every[:, feature] > 0]
        assert one.mean_active == (active.sum() / len(active) if len(active) else 0)


def _columns(table):
    return table.column_names, table.columns


def _least(every: np.ndarray) -> np.ndarray:
    least = np.where(every > 0, every, np.inf).min(0)
    return np.where(np.isinf(least), 0, least)


def test_values_quantiles_and_histograms_are_exact(store, layer, truth) -> None:
    every = np.concatenate(truth)
    for feature in range(tiny.D_SAE):
        values = np.sort(every[:, feature][every[:, feature] > 0])
        np.testing.assert_array_equal(store.values(layer, feature), values[::-1])
        if not len(values):
            with pytest.raises(NotFoundError, match="never fires"):
                store.quantiles(layer, feature, [0.5])
            assert store.histogram(layer, feature, 3).counts.tolist() == [0, 0, 0]
            continue
        shares = [0, 0.1, 0.25, 0.5, 0.9, 1]
        expected = np.quantile(values, shares, method="inverted_cdf")
        np.testing.assert_array_equal(store.quantiles(layer, feature, shares), expected)
        found = store.histogram(layer, feature, 5)
        counts, edges = np.histogram(values.astype(np.float64), 5, (0, float(values[-1])))
        np.testing.assert_array_equal(found.counts, counts)
        np.testing.assert_array_equal(found.edges, edges)
        assert store.histogram(layer, feature, [0.0, 0.2, 100.0]).counts.sum() == len(values)


@pytest.mark.parametrize("reduction", ["any", "last", "mean", "max"])
def test_firing_under_every_reduction(store, layer, truth, reduction) -> None:
    expected = {}
    for document, some in enumerate(truth):
        for feature in np.flatnonzero((some > 0).any(0)):
            column = some[:, feature]
            if reduction == "last" and not column[-1]:
                continue
            value, position = {
                "any": (1.0, int(np.flatnonzero(column)[0])),
                "max": (column.max(), int(column.argmax())),
                "mean": (np.float32(column.astype(np.float64).sum() / len(column)), -1),
                "last": (column[-1], len(column) - 1),
            }[reduction]
            expected[document, layer, int(feature)] = (float(value), position)
    table = store.firing(reduction, [layer]).to_pylist()
    found = {(r["document"], r["layer"], r["feature"]): (r["value"], r["position"]) for r in table}
    assert found == expected
    assert list(found) == sorted(found)
    some = {(4, 6): 17, (2, 3): 5}
    part = store.firing(reduction, [layer], features=list(some.values()), documents=[2, 3, 4, 6]).to_pylist()
    kept = {key: v for key, v in expected.items() if key[2] in (17, 5) and key[0] in (2, 3, 4, 6)}
    assert {(r["document"], r["layer"], r["feature"]): (r["value"], r["position"]) for r in part} == kept
    assert len(store.firing(reduction, [layer], features=[5])) == sum(key[2] == 5 for key in expected)


def test_documents_of_a_feature_and_features_of_a_document(store, layer, truth, busiest) -> None:
    found = store.documents_of(layer, busiest).to_pylist()
    expected = [(i, some[:, busiest].max(), (some[:, busiest] > 0).sum()) for i, some in enumerate(truth)]
    expected = sorted((row for row in expected if row[2]), key=lambda row: (-row[1], row[0]))
    assert [(r["document"], r["maximum"], r["tokens"]) for r in found] == expected
    for document in (0, 5, 16):
        some = truth[document]
        rows = store.document_features(document, layer).to_pylist()
        order = sorted(np.flatnonzero((some > 0).any(0)).tolist(), key=lambda f: (-some[:, f].max(), f))
        assert [r["feature"] for r in rows] == order
        for row in rows:
            column = some[:, row["feature"]]
            assert (row["maximum"], row["position"]) == (column.max(), column.argmax())
            assert (row["tokens"], row["sum"]) == ((column > 0).sum(), column.astype(np.float64).sum())


def test_cofiring(store, layer, truth, busiest) -> None:
    for other in stores.LAYERS:
        on = np.concatenate(stores.from_store(store, other)) > 0
        mine = np.concatenate(truth)[:, busiest] > 0
        both, either = (on & mine[:, None]).sum(0), (on | mine[:, None]).sum(0)
        rows = store.cofiring(layer, busiest, None, other_layer=other).to_pylist()
        expected = {f: both[f] / either[f] for f in np.flatnonzero(both) if (other, f) != (layer, busiest)}
        assert {r["feature"]: r["jaccard"] for r in rows} == expected
        assert [r["jaccard"] for r in rows] == sorted(expected.values(), reverse=True)


def test_contexts_show_the_place_and_what_stands_around(store, layer, truth, busiest) -> None:
    every = store.values(layer, busiest)
    found = store.contexts(layer, busiest, 10, before=3, after=2)
    assert [c.value for c in found] == every[:10].tolist()
    for context in found:
        some = truth[context.document]
        assert context.value == some[context.position, busiest]
        assert context.start == max(0, context.position - 3)
        end = min(len(some), context.position + 3)
        assert context.values == tuple(some[context.start : end, busiest].tolist())
        assert context.text in stores.TEXTS[context.document]
    whole = store.contexts(layer, busiest, 1, before=999, after=999)[0]
    assert whole.text == stores.TEXTS[whole.document]


def test_contexts_by_chance_and_by_quantile(store, layer, busiest, monkeypatch) -> None:
    from qwen_scope.store import contexts

    every = store.values(layer, busiest)
    assert len(store.contexts(layer, busiest, 10**6, how="random")) == len(every)
    a, b = (store.contexts(layer, busiest, 7, how="random", seed=s) for s in (1, 2))
    assert a == store.contexts(layer, busiest, 7, how="random", seed=1)
    assert a != b
    assert len({(c.document, c.position) for c in a}) == 7
    spread = store.contexts(layer, busiest, 6, how="quantiles", strata=3)
    edges = [len(every) * i // 3 for i in range(4)]
    for i in range(3):
        for context in spread[2 * i : 2 * i + 2]:
            assert every[edges[i]] >= context.value >= every[edges[i + 1] - 1]
    monkeypatch.setattr(contexts, "AT_ONCE", 0)  # the way of features with very many rows
    assert store.contexts(layer, busiest, 6, how="quantiles", strata=3) == spread


def test_both_sort_orders_hold_the_same_rows(store) -> None:
    assert store.sql("SELECT * FROM activations EXCEPT ALL SELECT * FROM features").num_rows == 0
    rows = store.sql("SELECT layer, feature, value, document, position FROM features").to_pylist()
    keys = [(r["layer"], r["feature"], -r["value"], r["document"], r["position"]) for r in rows]
    assert keys == sorted(keys)
    assert len(rows) == sum(info.activations for info in store.manifest.layers.values())


def test_tokens_and_documents_come_back(store) -> None:
    rows = store.sql(
        "SELECT document, string_agg(text, '' ORDER BY position) AS text FROM tokens GROUP BY 1 ORDER BY 1"
    )
    assert rows["text"].to_pylist() == stores.TEXTS
    german = store.sql("SELECT document FROM documents WHERE meta->>'language' = ? ORDER BY document", ["de"])
    assert german["document"].to_pylist() == [i for i, row in enumerate(stores.ROWS) if row["language"] == "de"]
    ids = store.sql("SELECT token FROM tokens WHERE document = 0 ORDER BY position")["token"].to_pylist()
    assert ids == stores.scope().tokenizer(stores.TEXTS[0])["input_ids"]


def test_another_sae_is_refused(store, layer) -> None:
    store.require(layer, stores.saes()[layer])
    store.require(layer, stores.saes()[layer].to(dtype=torch.bfloat16))
    other = Identity("SAE-Res-Tiny-W96-L0_6", layer, "f" * 64)
    with pytest.raises(MismatchError, match="can't answer about"):
        store.require(layer, other)
    with pytest.raises(MismatchError, match="can't answer about"):
        FeatureStore(store.folder, {layer: other})
    with pytest.raises(NotFoundError, match="has no layer 1; it has layers 0, 2"):
        store.require(1, other)


def test_an_sae_whose_files_name_no_layer_may_ask_what_it_was_extracted_for(store, layer, tmp_path: Path) -> None:
    sae = stores.saes()[layer]
    nameless = replace(sae, identity=replace(sae.identity, layer=None))
    store.require(layer, nameless)
    with pytest.raises(MismatchError, match="can't answer about"):
        store.require(min(set(stores.LAYERS) - {layer}), nameless)
    options = ExtractOptions(window_tokens=100, batch_tokens=80)
    with extract(Corpus(stores.TEXTS[:2]), stores.loaded(), {layer: nameless}, tmp_path / "made", options) as made:
        assert made.layers == [layer]
        made.require(layer, nameless)
        made.require(layer, sae)


def test_questions_that_make_no_sense(store, layer) -> None:
    with pytest.raises(NotFoundError, match="features 0 to 95, not 96"):
        store.feature(layer, 96)
    with pytest.raises(NotFoundError, match="features 0 to 95, not -1"):
        store.contexts(layer, -1)
    with pytest.raises(NotFoundError, match="documents 0 to 16, not 17"):
        store.document_features(17, layer)
    with pytest.raises(NotFoundError, match="no layer of"):
        store.firing("max", [layer], features=[96])
    with pytest.raises(InputError, match="one of any, max, mean, last"):
        firing_query("median", [0], None, None)
    with pytest.raises(InputError, match="DuckDB refuses"):
        store.sql("SELECT nothing FROM nowhere")
    with pytest.raises(InputError, match="between 0 and 1"):
        store.quantiles(layer, 0, [2.0])
    with pytest.raises(NotFoundError, match="extract with --pool mean"):
        store.residuals(layer)


def test_the_manifest_survives_and_the_parts_are_checked(store) -> None:
    text = (store.folder / "manifest.json").read_text()
    assert Manifest.from_json(text) == store.manifest
    assert Manifest.from_json(text).to_json() == text
    store.verify()
    assert json.loads(text)["format"] == "qwen-scope-store"
    assert replace(store.manifest, tokens=1) != store.manifest
    assert not (store.folder / "work").exists()


def as_version_1(folder: Path, sinks: dict[int, float]) -> None:
    """Make a finished store into one as version 1 had them: no spans, the median norm of each layer, old options."""
    shutil.rmtree(folder / "spans")
    manifest = json.loads((folder / "manifest.json").read_text())
    request = {k: v for k, v in manifest["request"].items() if k not in ("counted", "counted_by")}
    manifest |= {"version": 1, "request": {**request, "skip_special": False, "sink_multiple": 10.0}}
    manifest["parts"] = [part for part in manifest["parts"] if not part["file"].startswith("spans/")]
    manifest["layers"] = [{**entry, "median_norm": sinks[entry["layer"]] / 10} for entry in manifest["layers"]]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_a_store_of_version_1_is_read_with_what_it_left_out(tmp_path: Path) -> None:
    """Its thresholds are a multiple of the median, as its own fields say; it knows no phases."""
    ids = torch.tensor([stores.scope().tokenizer(stores.TEXTS[0])["input_ids"]])
    read = capture(stores.scope().model, ids, [HookPoint(layer) for layer in stores.LAYERS])
    limits = {point.layer: float(h.norm(dim=-1).median()) for point, h in read.items()}
    norms = {f"layers.{layer}.resid_post": limit for layer, limit in limits.items()}
    with stores.make(tmp_path / "s", counted=Counted(first=0, norms=norms)) as made:
        wanted, left_out = stores.from_store(made, 0), made.left_out()
        assert {reason for counts in left_out.values() for reason in counts} == {"sink"}
    as_version_1(tmp_path / "s", limits)
    with FeatureStore(tmp_path / "s") as old:
        old.verify()
        assert old.manifest.counted is not None
        assert old.manifest.counted.norms == pytest.approx(norms)
        assert old.manifest.counted.first == 0
        assert old.left_out() == left_out
        for found, expected in zip(stores.from_store(old, 0), wanted, strict=True):
            np.testing.assert_array_equal(found, expected)
        with pytest.raises(NotFoundError, match=r"does not tell the phases of its documents; read the corpus again"):
            old.firing(phases=["text"])
    with pytest.raises(InputError, match=r"begun with other options .*skip_special was False, now None"):
        stores.make(tmp_path / "s")

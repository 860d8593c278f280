"""FADE by a judge, the two halves of the documents, and what chance gives: each against a slow restatement."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import lab_store
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from qwen_scope import FeatureStore
from qwen_scope.errors import InputError
from qwen_scope.features import (
    Endpoint,
    LabelOptions,
    ModelJudge,
    Notes,
    RuleJudge,
    TokenJudge,
    common_firings,
    label_features,
    make_label,
    material,
    scored_label,
)
from qwen_scope.trust import CardOptions, card, chance_jaccard, halves, judged
from qwen_scope.trust.halves import Halves, second_half
from qwen_scope.trust.judged import Judged, strongest_in, texts_for, texts_of, windows

LAYER, OTHER = lab_store.LAYER, lab_store.OTHER


@pytest.fixture
def own(tmp_path: Path) -> Iterator[FeatureStore]:
    with FeatureStore(lab_store.copied(tmp_path)) as opened:
        yield opened


def some(store: FeatureStore) -> int:
    """A feature that fires in about half of the documents."""
    documents = store.stats(LAYER)["documents"].to_numpy()
    return int(np.argmin(np.abs(documents - store.manifest.documents // 2)))


# --- two halves ----------------------------------------------------------------------------------------------------


def test_halves_are_even_in_every_stretch_and_stride() -> None:
    for step in (1, 2, 3, 4, 7):
        for start in (0, 1, 500):
            share = second_half(np.arange(start, start + 400 * step, step)).mean()
            assert share == pytest.approx(0.5, abs=0.06)
    assert second_half(np.arange(64), 0).tolist() != second_half(np.arange(64), 1).tolist()


def test_halves_are_those_of_brute_force(store: FeatureStore) -> None:
    feature = some(store)
    found = halves(store, LAYER, feature, lab_store.scope().saes[LAYER])
    on = common_firings(store, LAYER, store, LAYER)[0].to_dense().numpy() > 0
    rows = store.sql("SELECT document, token FROM tokens ORDER BY document, position")
    document, token = (rows[name].to_numpy() for name in ("document", "token"))
    later = second_half(document)
    assert found.documents == tuple(
        int((second_half(np.arange(store.manifest.documents)) == side).sum()) for side in (0, 1)
    )
    assert found.tokens == tuple(int(on[later == side, feature].sum()) for side in (0, 1))

    def shares(which: int, side: int) -> np.ndarray:
        counts = np.bincount(token[on[:, which] & (later == side)], minlength=token.max() + 1)
        return counts / max(1, counts.sum())

    rates, norms = on.mean(0), np.linalg.norm(lab_store.scope().saes[LAYER].W_dec.float().numpy(), axis=0)
    near = [
        f for f in np.argsort(np.abs(rates - rates[feature]), kind="stable") if f != feature and rates[f] and norms[f]
    ]
    overlap = [np.sqrt(shares(feature, 0) * shares(other, 1)).sum() for other in [feature, *near[:19]]]
    assert found.overlap == pytest.approx(overlap[0])
    assert found.chance == pytest.approx(max(overlap[1:]))
    assert found.controls == 19
    for side in (0, 1):
        here = on[later == side]
        jaccard = (here & here[:, [feature]]).sum(0) / np.maximum(1, (here | here[:, [feature]]).sum(0))
        jaccard[feature] = 0
        assert found.jaccards[side] == pytest.approx(jaccard.max())
        assert found.partners[side] == int(jaccard.argmax())
    assert Halves.from_json(json.loads(json.dumps(found.to_json()))) == found
    silent = int(store.stats(LAYER)["tokens"].to_numpy().argmin())
    with pytest.raises(InputError, match="does not fire in both halves"):
        halves(store, LAYER, silent)


def test_chance_of_another_layer_is_that_of_shuffled_tokens(store: FeatureStore) -> None:
    """The best of a layer's features, over many shuffles of its tokens: 99 of 100 lie below."""
    a, b = (one.to_dense().numpy() > 0 for one in common_firings(store, LAYER, store, OTHER))
    feature, rng = some(store), np.random.default_rng(0)
    mine, others = a[:, feature], b.sum(0)
    best = []
    for _ in range(300):
        both = mine[rng.permutation(len(mine))].astype(np.float32) @ b
        best.append((both / (mine.sum() + others - both)).max())
    chance = chance_jaccard(int(mine.sum()), others, len(b))
    assert np.mean(np.array(best) <= chance) >= 0.97
    assert chance <= 1.5 * np.quantile(best, 0.99)
    assert chance_jaccard(0, others, len(b)) == chance_jaccard(5, np.zeros(3, np.int64), 9) == 0


# --- FADE by a judge -----------------------------------------------------------------------------------------------


def test_the_offline_judge_tells_all_three(store: FeatureStore) -> None:
    feature, scope = some(store), lab_store.scope()
    given = material(store, LAYER, feature, LabelOptions())
    name = TokenJudge().explain(given.examples)
    found = judged(store, LAYER, feature, name, TokenJudge(), scope)
    contexts = [*given.firing, *given.silent]
    y = TokenJudge().detect(name, contexts)
    values = [max(one.values) for one in contexts]
    gini = 2 * roc_auc_score(y, values) - 1
    assert found.responsiveness == pytest.approx(abs(gini))
    assert found.purity == pytest.approx(average_precision_score(y, values if gini >= 0 else -np.array(values)))
    assert (found.fitting, found.rated) == (sum(y), len(y))
    texts = texts_for(TokenJudge(), name, given)
    words = json.loads(f"[{name.removeprefix('typical tokens: ')}]")
    assert all(any(word in text for word in words) for text in texts)
    written = [max(a for a in scope.features([text], [LAYER]).acts[LAYER][0].to_dense()[:, feature].tolist()[1:])
               for text in texts]  # fmt: skip
    natural = windows(store, LAYER, feature)
    y = [1] * len(written) + [0] * len(natural)
    assert found.clarity == pytest.approx(abs(2 * roc_auc_score(y, [*written, *natural]) - 1), abs=0.02)
    assert (found.written, found.natural) == (len(texts), len(natural))
    assert Judged.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert judged(store, LAYER, feature, name, TokenJudge()).clarity is None
    assert texts_for(TokenJudge(), "German", given) == []


def test_windows_hold_what_the_store_has(store: FeatureStore) -> None:
    feature = some(store)
    dense = common_firings(store, LAYER, store, LAYER)[0].to_dense()[:, feature].numpy()
    found = windows(store, LAYER, feature)
    every = {0.0, *np.unique(dense).tolist()}
    assert set(found.tolist()) <= every
    assert 0 < (found > 0).mean() < 1
    assert found.max() <= dense.max()


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        ('["a", "b"]', ["a", "b"]),
        ('Here: ["a", " "] and ["c [d]"]', ["c [d]"]),
        ("[1, 2]", []),
        ("none", []),
        ('["a"', []),
    ],
)
def test_the_texts_of_an_answer(answer: str, texts: list[str]) -> None:
    assert texts_of(answer) == texts


@contextmanager
def writing(texts: list[str]) -> Iterator[tuple[str, list[dict]]]:
    """A server that writes these texts, and calls every second text fitting."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            system, user = (one["content"] for one in body["messages"])
            numbers = [i % 2 for i, line in enumerate(user.splitlines()) if line[:1].isdigit()]
            content = json.dumps(texts if system.startswith("Write") else numbers)
            data = json.dumps({"choices": [{"message": {"content": content}}], "usage": {"total_tokens": 1}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_judge_model_writes_texts_and_is_asked_once(own: FeatureStore) -> None:
    feature, scope = some(own), lab_store.scope()
    texts = [f"Guten Morgen, Frau {name}." for name in ("Adam", "Berg", "Clara", "Dietz", "Emil")]
    with writing(texts) as (url, asked):
        judge = ModelJudge(Endpoint(url, "writer"))
        label = scored_label(material(own, LAYER, feature), judge, "polite German")
        Notes(own).add(make_label(LAYER, feature, own.layer(LAYER).fingerprint, label))
        label_features(own, [(LAYER, feature + 1)], TokenJudge())
        before = len(asked)
        plain = card(LAYER, feature, store=own, scope=scope, options=CardOptions(n=2))
        assert len(asked) == before
        assert plain.judged is None
        assert any("writer judges this label" in one for one in plain.missing)
        found = card(LAYER, feature, store=own, scope=scope, judge=judge, options=CardOptions(n=2)).judged
        assert found is not None
        assert found.written == 5
        y = [1] * 5 + [0] * found.natural
        values = [*strongest_in(scope, LAYER, feature, texts), *windows(own, LAYER, feature)]
        assert found.clarity == pytest.approx(abs(2 * roc_auc_score(y, values) - 1))
        assert any(one["messages"][1]["content"] == "polite German" for one in asked)
        many = len(asked)
        again = card(LAYER, feature, store=own, scope=scope, options=CardOptions(n=2)).judged
        assert (again, len(asked)) == (found, many)


def test_a_judge_that_can_t_be_reached_is_a_reason(own: FeatureStore) -> None:
    feature = some(own)
    with writing([]) as (url, _):
        judge = ModelJudge(Endpoint(url, "writer"))
        label = scored_label(material(own, LAYER, feature), judge, "polite German")
        Notes(own).add(make_label(LAYER, feature, own.layer(LAYER).fingerprint, label))
    gone = ModelJudge(Endpoint(url, "writer", tries=1, timeout=1, wait=0.001))
    found = card(LAYER, feature, store=own, scope=lab_store.scope(), judge=gone, options=CardOptions(n=2))
    assert found.judged is None
    assert any("clarity" in one and "gave no answer" in one for one in found.missing)


@pytest.mark.parametrize("judge", [TokenJudge(), RuleJudge()], ids=["tokens", "rules"])
def test_the_rule_s_label_is_scored_beside_another_even_where_it_is_the_only_one(
    own: FeatureStore, judge: TokenJudge | RuleJudge
) -> None:
    feature = some(own)
    label_features(own, [(LAYER, feature)], judge)
    made = card(LAYER, feature, store=own, scope=lab_store.scope(), options=CardOptions(n=2))
    found = made.control
    assert found is not None
    assert made.judged is not None
    assert made.judged.judge == judge.scorer
    assert made.judged.clarity is not None or made.judged.written < 4
    other = material(own, *map(int, found.of.split("/")))
    assert found.label == scored_label(material(own, LAYER, feature), judge, judge.explain(other.examples))
    again = card(LAYER, feature, store=own, scope=lab_store.scope(), options=CardOptions(n=2))
    assert (again.control, again.judged) == (found, made.judged)

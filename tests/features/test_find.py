"""`find` against brute force on a small store, on planted features, and on the lab."""

from __future__ import annotations

import json
from pathlib import Path

import lab_store
import numpy as np
import pytest
from lab_store import LAYER, OTHER
from scipy import sparse

from qwen_scope import FeatureStore, load_scope
from qwen_scope.cli import main
from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.features import (
    FindOptions,
    Pooled,
    find_pooled,
    language_features,
    pool_store,
    pool_texts,
    repeat_features,
    repeats_in_store,
    repeats_in_texts,
)
from qwen_scope.features.repeats import Changes
from qwen_scope.features.scores import best_f1
from qwen_scope.lab import documents
from qwen_scope.scope import Scope
from qwen_scope.text import REASONS, Counted


@pytest.fixture(scope="module")
def scope() -> Scope:
    return load_scope("lab", device="cpu", counted=Counted.everything())  # as the store was made


def texts_of(store: FeatureStore, rows: list[int]) -> list[str]:
    out = []
    for document in rows:
        found = store.sql("SELECT text FROM tokens WHERE document = ? ORDER BY position", [document])
        out.append("".join(found["text"].to_pylist()))
    return out


def dense_pooled(values: np.ndarray, layer: int = 0) -> Pooled:
    """Documents of one token each."""
    table = sparse.csc_array(values.astype(np.float32))
    return Pooled(layer, values.shape[1], np.ones(len(values), np.int64), table, table, sparse.csc_array(values > 0))


def test_a_store_and_the_model_give_the_same_documents(store: FeatureStore, scope: Scope) -> None:
    rows = [40, 3, 17]
    stored, direct = pool_store(store, rows), pool_texts(scope, texts_of(store, rows), [OTHER, LAYER])
    for layer in (OTHER, LAYER):
        a, b = stored[layer], direct[layer]
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.maximum.toarray(), b.maximum.toarray(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(a.total.toarray(), b.total.toarray(), rtol=1e-4, atol=1e-3)


def test_pooling_is_what_it_says(scope: Scope) -> None:
    texts = ["Wo ist der Bahnhof?", "Where is the station?"]
    seen, pooled = scope.features(texts, [LAYER]), pool_texts(scope, texts, [LAYER])[LAYER]
    later = pool_texts(lab_store.scope(), texts, [LAYER])[LAYER]
    features = np.arange(pooled.width)
    for i in range(len(texts)):
        dense = seen.of(i, LAYER).to_dense().numpy()
        np.testing.assert_array_equal(pooled.values("max", features)[i], dense.max(0))
        np.testing.assert_allclose(pooled.values("mean", features)[i], dense.mean(0), rtol=1e-5)
        np.testing.assert_array_equal(pooled.fires.toarray()[i], (dense > 0).sum(0))
        np.testing.assert_array_equal(later.values("max", features)[i], dense[1:].max(0))
        np.testing.assert_allclose(later.values("mean", features)[i], dense[1:].mean(0), rtol=1e-5)
        assert (pooled.tokens[i], later.tokens[i]) == (len(dense), len(dense) - 1)
    assert later.left_out == {**dict.fromkeys(REASONS, 0), **later.left_out, "first": 2, "counts": sum(later.tokens)}
    assert pooled.left_out["counts"] == sum(pooled.tokens)


@pytest.mark.slow
def test_a_sink_is_left_out_of_a_search_and_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of two texts that differ by one token, that token is made a sink: their documents are then the same."""
    opened = load_scope("lab", device="cpu", counted=Counted.everything())
    texts = ["Wo ist der Bahnhof, bitte?"]
    h = opened.capture(opened.tokenize(texts), [LAYER])[LAYER][0]
    norms = h[1:].norm(dim=-1)
    at, limit = 1 + int(norms.argmax()), float(norms.sort().values[-2:].mean())
    dense = opened.features(texts, [LAYER]).of(0, LAYER).to_dense().numpy()
    opened.counted.set(Counted(1, norms={f"layers.{LAYER}.resid_post": limit}))
    found = pool_texts(opened, texts, [LAYER])[LAYER]
    rest = [i for i in range(1, len(dense)) if i != at]
    np.testing.assert_array_equal(found.maximum.toarray()[0], dense[rest].max(0))
    assert (found.left_out["sink"], found.left_out["first"], found.tokens[0]) == (1, 1, len(rest))

    for name, language in (("p", "de"), ("n", "en")):
        some = documents(seed=3, n=6, kinds=["talk"], languages=[language])
        (tmp_path / f"{name}.txt").write_text("\n".join(d.text.splitlines()[0] for d in some), encoding="utf-8")
    sides = ["--positive", str(tmp_path / "p.txt"), "--negative", str(tmp_path / "n.txt")]
    asked = ["find", *sides, "--layers", str(LAYER)]
    assert main(asked) == 0
    assert "left out: 12 first tokens" in " ".join(capsys.readouterr().out.split())
    assert main([*asked, "--count", "all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"][str(LAYER)]["first"] == 0
    assert main(["find", "nowhere", "--positive", "language=de", "--count", "all"]) == 2


def test_the_best_threshold_is_found_among_all() -> None:
    rng = np.random.default_rng(0)
    a, b = (np.maximum(0, rng.normal(m, 1, (15, 40))).astype(np.float32) for m in (0.6, 0.0))
    f1, threshold = best_f1(a, b)
    for i in range(40):
        tried = [0.0, *np.concatenate([a[:, i], b[:, i]]).tolist()]
        scores = [2 * (a[:, i] > t).sum() / ((a[:, i] > t).sum() + (b[:, i] > t).sum() + 15) for t in tried]
        assert f1[i] == pytest.approx(max(scores))
        here = (
            2 * (a[:, i] > threshold[i]).sum() / ((a[:, i] > threshold[i]).sum() + (b[:, i] > threshold[i]).sum() + 15)
        )
        assert here == pytest.approx(f1[i])


def test_a_planted_feature_comes_first_and_alone_is_believed() -> None:
    rng = np.random.default_rng(1)
    values = np.maximum(0, rng.normal(-1, 1, (80, 3000)))
    values[:40, 1234] = rng.uniform(2, 3, 40)
    found = find_pooled({0: dense_pooled(values[:40])}, {0: dense_pooled(values[40:])}, FindOptions(n=3))
    first = found.found[0]
    assert (first.feature, first.significant, found.significant) == (1234, True, 1)
    assert first.f1.estimate > 0.9
    assert first.auroc.estimate > 0.9
    assert first.difference.low > 1
    assert found.tests == 2 * 3000
    assert not any(one.significant for one in found.found[1:])
    for by in ("difference", "rate", "auroc"):
        assert (
            find_pooled({0: dense_pooled(values[:40])}, {0: dense_pooled(values[40:])}, FindOptions(n=1, by=by))
            .found[0]
            .feature
            == 1234
        )


@pytest.mark.slow
def test_figures_come_from_documents_that_chose_nothing() -> None:
    """Under noise the best of thousands looks good where it was chosen, and like chance where it was measured."""
    held = []
    for seed in range(10):
        values = np.maximum(0, np.random.default_rng(seed).normal(size=(40, 2000)))
        found = find_pooled(
            {0: dense_pooled(values[:20])}, {0: dense_pooled(values[20:])}, FindOptions(n=1, seed=seed, by="auroc")
        )
        held.append(found.found[0].auroc.estimate)
    assert abs(np.mean(held) - 0.5) < 0.12


@pytest.mark.slow
def test_shuffled_labels_report_nothing(store: FeatureStore) -> None:
    pooled = pool_store(store, range(48))
    quiet = 0
    for seed in range(20):
        rows = np.random.default_rng(seed).permutation(48)
        sides = [{layer: one.rows(half) for layer, one in pooled.items()} for half in (rows[:24], rows[24:])]
        quiet += find_pooled(*sides, FindOptions(n=1, seed=seed)).significant == 0
    assert quiet >= 19


@pytest.mark.slow
@pytest.mark.parametrize("factor", ["de", "zh/rude", "arithmetic"])
def test_factors_of_the_lab_have_a_feature(scope: Scope, factor: str) -> None:
    """The small brother of experiments/lab/find.py."""
    language, _, register = factor.partition("/")
    if factor == "arithmetic":
        with_it, without = {"kinds": ["arithmetic"]}, {"kinds": ["talk", "code", "prose"]}
    elif register:
        with_it = {"kinds": ["talk"], "languages": [language], "registers": [register]}
        without = {"kinds": ["talk"], "languages": [language], "registers": ["plain", "polite", "archaic"]}
    else:
        with_it = {"kinds": ["talk"], "languages": [language]}
        without = {"kinds": ["talk"], "languages": ["en", "fr", "zh", "ru"]}
    sets = [pool_texts(scope, [d.text for d in documents(seed=9, n=40, **some)]) for some in (with_it, without)]
    first = find_pooled(*sets, FindOptions(n=1)).found[0]
    assert first.significant
    assert first.f1.estimate >= 0.95


def test_the_language_score_is_the_difference_of_token_means(store: FeatureStore) -> None:
    pooled = {name: pool_store(store, store.where(("language", name, True)), [LAYER]) for name in ("de", "en", "zh")}
    mean = {}
    for name in pooled:
        rows = store.where(("language", name, True)).tolist()
        found = store.sql(
            "SELECT feature, sum(value::DOUBLE) AS s FROM activations WHERE layer = ? AND list_contains(?, document)"
            " GROUP BY feature",
            [LAYER, rows],
        )
        tokens = store.sql("SELECT sum(tokens) AS n FROM documents WHERE list_contains(?, document)", [rows])["n"][
            0
        ].as_py()
        mean[name] = np.zeros(store.layer(LAYER).d_sae)
        mean[name][found["feature"].to_numpy()] = found["s"].to_numpy() / int(tokens)
    for one in language_features(pooled, n=2):
        others = [mean[name] for name in mean if name != one.language]
        score = mean[one.language] - np.mean(others, axis=0)
        assert one.score.estimate == pytest.approx(score[one.feature], rel=1e-6)
        assert one.score.estimate >= np.sort(score)[-2] - 1e-6
        assert one.score.low < one.score.estimate < one.score.high
        assert one.score.n == 16
    with pytest.raises(InputError, match="at least two"):
        language_features({"de": pooled["de"]})
    alone = {LAYER: pooled["de"][LAYER].rows(np.array([0]))}
    with pytest.raises(InputError, match="at least two documents"):
        language_features({"de": alone, "en": pooled["en"]})


def test_the_interval_of_the_language_score_is_that_of_documents() -> None:
    """Three languages whose documents differ in length, each resampled on its own."""
    rng, groups, columns = np.random.default_rng(3), {}, {}
    for i, name in enumerate("abc"):
        tokens, total = rng.integers(5, 50, 30), np.zeros((30, 4))
        total[:, i] = tokens * rng.gamma(2, 1, 30)
        table = sparse.csc_array(total)
        groups[name] = {0: Pooled(0, 4, tokens, table, table, sparse.csc_array(total > 0))}
        columns[name] = np.stack([total[:, 0], tokens])
    one = language_features(groups, n=1)[0]
    assert (one.language, one.feature) == ("a", 0)

    drawn = []
    for _ in range(4000):
        some = [column[:, rng.integers(0, 30, 30)].sum(1) for column in columns.values()]
        a, b, c = (total / tokens for total, tokens in some)
        drawn.append(a - (b + c) / 2)
    low, high = np.quantile(drawn, [0.025, 0.975])
    spread = high - low
    assert one.score.low == pytest.approx(low, abs=0.1 * spread)
    assert one.score.high == pytest.approx(high, abs=0.1 * spread)
    assert one.score == language_features(groups, n=1)[0].score, "the seed decides"
    assert one.score != language_features(groups, n=1, seed=1)[0].score


@pytest.mark.slow
def test_repeats_compare_the_same_token(store: FeatureStore, scope: Scope) -> None:
    rows = store.where(("kind", "repetition", True)).tolist()
    stored = repeats_in_store(store, [LAYER], documents=rows)[LAYER]
    texts = texts_of(store, rows)
    direct = repeats_in_texts(scope, texts, [LAYER])[LAYER]
    seen, expected = scope.features(texts, [LAYER]), []
    for i in range(len(texts)):
        ids, dense = seen.input_ids[i][seen.mask[i]].tolist(), seen.of(i, LAYER).to_dense().numpy()
        twice = [one for one in dict.fromkeys(ids) if ids.count(one) >= 2]
        last = [len(ids) - 1 - ids[::-1].index(one) for one in twice]
        expected.append(np.mean([dense[b] - dense[ids.index(one)] for one, b in zip(twice, last, strict=True)], axis=0))
    np.testing.assert_allclose(direct.mean.toarray(), expected, atol=1e-4)
    np.testing.assert_allclose(stored.mean.toarray(), expected, atol=1e-3)
    first = repeat_features({LAYER: direct}, 1)[0]
    assert first.rise.estimate == pytest.approx(np.max(np.mean(expected, axis=0)), rel=1e-4)
    with pytest.raises(InputError, match="times"):
        repeats_in_texts(scope, ["Where is it?"], [LAYER], times=9)


def test_a_first_token_is_no_first_occurrence(scope: Scope) -> None:
    text = "no no no no"
    dense = scope.features([text], [LAYER]).of(0, LAYER).to_dense().numpy()
    ids = scope.tokenize([text]).input_ids[0].tolist()
    later = {one: [i for i, other in enumerate(ids) if i and other == one] for one in ids}
    expected = [dense[at[-1]] - dense[at[0]] for at in later.values() if len(at) > 1]
    found = repeats_in_texts(lab_store.scope(), [text], [LAYER])[LAYER]
    assert found.tokens.tolist() == [len(expected)]
    np.testing.assert_allclose(found.mean.toarray()[0], np.mean(expected, axis=0), atol=1e-5)


def test_rises_that_a_few_documents_make_are_not_significant() -> None:
    rng = np.random.default_rng(0)
    mean = np.zeros((20, 8))
    mean[:, 0] = 0.5 + 0.1 * rng.random(20)  # everywhere a little
    mean[:2, 1] = 40.0  # twice a lot
    mean[:, 2] = -mean[:, 0]
    changes = {LAYER: Changes(LAYER, 8, sparse.csc_array(mean), np.ones(20, np.int64))}
    ranked = repeat_features(changes, 3)
    assert [(one.feature, one.significant) for one in ranked[:2]] == [(1, False), (0, True)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"level": 0.0}, "false discovery rate"),
        ({"n": 0}, "whole number of at least 1; got 0"),
        ({"n": -3}, "whole number of at least 1; got -3"),
    ],
)
def test_searches_that_make_no_sense_are_refused(words: dict, said: str) -> None:
    some = {0: dense_pooled(np.ones((5, 3)))}
    with pytest.raises(InputError, match=said):
        find_pooled(some, some, FindOptions(**words))
    with pytest.raises(InputError, match="same layers"):
        find_pooled(some, {1: some[0]})
    with pytest.raises(InputError, match="at least 4"):
        find_pooled({0: dense_pooled(np.ones((3, 3)))}, some)


def test_metadata_choose_documents(store: FeatureStore) -> None:
    assert store.where(("language", "de", True)).tolist() == list(range(16))
    assert store.where(("language", "de", False), ("n", "3", True)).tolist() == [19, 35]
    with pytest.raises(NotFoundError, match="language"):
        store.where(("langage", "de", True))


@pytest.mark.slow
def test_the_command_finds_in_a_store_and_in_files(folder: Path, tmp_path: Path, capsys) -> None:
    layers = ["--layers", str(LAYER)]
    assert main(["find", str(folder), "--positive", "language=de", *layers, "-n", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["found"][0]["significant"]
    assert (found["positives"], found["negatives"]) == (16, 44)
    assert main(["find", str(folder), "--positive", "language=de", "--negative", "language=en", *layers]) == 0
    assert "false discovery rate" in capsys.readouterr().out
    for name, language in (("a.txt", "de"), ("b.jsonl", "en")):
        texts = [d.text.replace("\n", " ") for d in documents(seed=3, n=8, kinds=["talk"], languages=[language])]
        lines = texts if name.endswith("txt") else [json.dumps({"text": text}) for text in texts]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    sets = ["--positive", str(tmp_path / "a.txt"), "--negative", str(tmp_path / "b.jsonl")]
    assert main(["find", *sets, *layers, "-n", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["positives"] == 8
    # The one repetition feature asked for is not significant here, so it is counted, not shown.
    for more, said in ((["--groups", "language"], "layer"), (["--repetition", "kind=repetition"], "left out")):
        assert main(["find", str(folder), *more, *layers, "-n", "1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)
        assert main(["find", str(folder), *more, *layers, "-n", "1"]) == 0
        assert said in capsys.readouterr().out
    capsys.readouterr()
    for words in (["--promotes", "the"], ["--near", "5/3"]):
        assert main(["find", *words, *layers, "-n", "2", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)
        assert main(["find", *words, *layers, "-n", "2"]) == 0
        assert "layer" in capsys.readouterr().out
    assert main(["find", str(folder), "--near", "5/3", "-n", "2"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--positive", "lab:language=xx", "--negative", "lab:language=de"], "'xx'"),
        (["--positive", "lab:colour=red", "--negative", "lab:language=de"], "colour"),
        (["--positive", "nowhere.txt", "--negative", "nowhere.txt"], "nowhere.txt"),
        (["--positive", "lab:language=de"], "--negative"),
        (["--promotes", "the", "--near", "5/3"], "ask one thing"),
        ([], "ask one thing"),
        (["--groups", "language"], "in a store"),
        (["--near", "five"], "LAYER/FEATURE"),
    ],
)
def test_bad_questions_end_with_one_sentence(words: list[str], said: str, capsys) -> None:
    assert main(["find", *words]) == 2
    caught = capsys.readouterr().err
    assert said in caught
    assert caught.count("\n") == 1


def test_bad_conditions_on_a_store_end_with_one_sentence(folder: Path, capsys) -> None:
    for words, said in ((["language"], "column=value"), (["language=xx"], "no document"), (["tongue=de"], "tongue")):
        assert main(["find", str(folder), "--positive", *words]) == 2
        assert said in capsys.readouterr().err

"""Rules, their thresholds and traces, noise, transfer and baselines, against the definitions restated."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import made
import numpy as np
import pytest

from qwen_scope.analysis import (
    Labelled,
    Rule,
    Student,
    data_efficiency,
    deltas,
    evaluate,
    f1,
    fit_rule,
    joined,
    layer_differences,
    logistic,
    mean_difference,
    noise_test,
    shared_features,
    transfer,
    try_rule,
)
from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError
from qwen_scope.stats import rates

WIDTH = 40


def seeds(n: int = 30, seed: int = 0, telling: float = 0.9) -> Labelled:
    """`n` documents per class at two layers; feature 3 of layer 1 tells them apart, feature 5 of layer 0 less so."""
    rng = np.random.default_rng(seed)
    labels = np.array([True] * n + [False] * n)
    layers = {}
    for layer, (feature, share) in {0: (5, 0.6), 1: (3, telling)}.items():
        sets = made.random_sets(2 * n, WIDTH, seed + layer, 0.1)
        for i, s in enumerate(sets):
            s.discard(feature)
            if rng.random() < (share if labels[i] else 0.05):
                s.add(feature)
        values = {(i, f): float(rng.uniform(0.5, 2)) for i, s in enumerate(sets) for f in s}
        layers[layer] = made.dataset(sets, WIDTH, "d", values=values, layer=layer, sae=f"sae{layer}")
    return Labelled(layers, labels)


def sets_of(data) -> list[set[int]]:
    return [set(data.feature[data.item == i].tolist()) for i in range(len(data))]


def test_deltas_are_differences_of_shares() -> None:
    some = seeds()
    sets = sets_of(some.layers[1])
    found = deltas(some.layers[1], some.labels)
    for f in range(WIDTH):
        positive = np.mean([f in s for s, y in zip(sets, some.labels, strict=True) if y])
        negative = np.mean([f in s for s, y in zip(sets, some.labels, strict=True) if not y])
        assert found[f] == pytest.approx(positive - negative, abs=1e-12)


def test_a_rule_is_the_top_features_of_the_best_layer_joined_by_or() -> None:
    some = seeds()
    ranked = layer_differences(some)
    assert max(ranked, key=lambda layer: ranked[layer]) == 1
    rule = fit_rule(some, 3)
    assert rule.layers == [1]
    top = sorted(range(WIDTH), key=lambda f: (-deltas(some.layers[1], some.labels)[f], f))[:3]
    assert [f.feature for f in rule.features] == top
    expected = [bool(s & set(top)) for s in sets_of(some.layers[1])]
    assert rule.decide(some.layers).tolist() == expected
    both = fit_rule(some, several=2)
    assert [(f.layer, f.feature) for f in both.features] == [(1, 3), (0, 5)]
    assert fit_rule(some, 1, layer=0).layers == [0]


def test_calibration_keeps_to_the_rate_and_is_the_best_common_cut() -> None:
    some = seeds(60, telling=0.7)
    rule = fit_rule(some, 4)
    values = rule.values(some.negatives())
    for target in (0.0, 0.05, 0.2, 0.5):
        tight = rule.calibrated(some.negatives(), target)
        called = tight.decide(some.negatives())
        assert called.mean() <= target
        passing = [n for n in range(60) if (values > -np.sort(-values, axis=0)[n]).any(1).mean() <= target + 1e-12]
        allowed = max(n for n in passing if n <= np.floor(target * 60))
        assert [f.threshold for f in tight.features] == pytest.approx((-np.sort(-values, axis=0))[allowed].tolist())


def test_a_weighted_rule_is_logistic_regression_on_its_features(tmp_path) -> None:
    """Restated: scikit-learn on the activations themselves, with the scale that `weighted_rule` documents."""
    from sklearn.linear_model import LogisticRegression

    some = seeds(telling=0.7)
    rule, data, labels = fit_rule(some, 5, weighted=True), some.layers[1], some.labels
    x = data.matrix(values=True).toarray().astype(float)
    apart = np.abs(x[labels].mean(0) - x[~labels].mean(0))
    assert [f.feature for f in rule.features] == sorted(range(WIDTH), key=lambda f: (-apart[f], f))[:5]
    x = x[:, [f.feature for f in rule.features]]
    centred = x - x.mean(0)
    unit = np.sqrt(5 / np.mean(np.sum(centred**2, 1)))
    model = LogisticRegression(max_iter=2000).fit(centred * unit, labels)
    expected = model.decision_function(centred * unit)
    assert rule.scores(some.layers) == pytest.approx(expected, abs=1e-6)
    assert rule.decide(some.layers).tolist() == (expected > 0).tolist()
    assert len(fit_rule(some, weighted=True).features) == min(16, WIDTH)

    rule.save(tmp_path / "r.json")
    assert Rule.load(tmp_path / "r.json") == rule
    whole = json.loads((tmp_path / "r.json").read_text())
    bare = [{key: value for key, value in one.items() if key != "weight"} for one in whole["features"]]
    for change in ({"intercept": "0"}, {"features": bare}, {"features": [{**whole["features"][0], "weight": None}]}):
        (tmp_path / "bad.json").write_text(json.dumps(whole | change))
        with pytest.raises(FormatError):
            Rule.load(tmp_path / "bad.json")
    with pytest.raises(InputError, match="intercept and a weight"):
        replace(rule, intercept=None)


def test_a_weighted_rule_tells_where_an_or_can_not() -> None:
    """Two features that fire on all documents, more strongly on those of one class: only how strongly they do tells."""
    rng = np.random.default_rng(0)
    labels = np.array([True] * 60 + [False] * 60)
    sets = [{0, 1} for _ in labels]
    data = made.dataset(sets, 2)
    data = replace(data, value=(rng.uniform(0, 1, len(data.value)) + labels[data.item]).astype(np.float32))
    some = Labelled({0: data}, labels)
    assert f1(fit_rule(some, 2), some) == pytest.approx(2 / 3)
    rule = fit_rule(some, 2, weighted=True)
    assert f1(rule, some) > 0.95
    for target in (0.0, 0.1, 0.3):
        tight = rule.calibrated(some.negatives(), target)
        assert tight.decide(some.negatives()).mean() <= target
        assert tight.decide(some.layers)[labels].mean() >= 0.5
    with pytest.raises(InputError, match="those of several are joined by OR"):
        fit_rule(Labelled({0: data, 1: replace(data, layer=1)}, labels), several=2, weighted=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_every_decision_has_its_evidence(weighted: bool) -> None:
    some = seeds()
    rule = fit_rule(some, 3, weighted=weighted).calibrated(some.negatives(), 0.1)
    called = rule.decide(some.layers)
    data = some.layers[1]
    for item in range(len(some)):
        trace = rule.trace(some.layers, item)
        assert bool(trace) == bool(called[item])
        for evidence in trace:
            row = np.flatnonzero((data.item == item) & (data.feature == evidence.feature))[0]
            assert evidence.value == pytest.approx(data.value[row])
            assert evidence.position == data.position[row]


def test_noise_is_called_noise() -> None:
    some = seeds(100)
    assert noise_test(some).p < 0.01
    rejected = 0
    for seed in range(10):
        mixed = Labelled(some.layers, np.random.default_rng(seed).permutation(some.labels))
        rejected += noise_test(mixed, seed=seed).p <= 0.05
    assert rejected <= 2
    pooled = {layer: np.random.default_rng(layer).normal(size=(200, 4)).astype(np.float32) for layer in (0, 1)}
    texts = tuple(f"text number {i}" for i in range(200))
    layers = {layer: replace(data, texts=texts) for layer, data in some.layers.items()}
    mixed = Labelled(layers, np.random.default_rng(3).permutation(some.labels))
    _, result = try_rule(mixed, mixed, pooled, pooled)
    assert result.data["noise_labels"]
    assert "look like noise" in result.notes[0]


def test_noise_test_equals_all_relabellings() -> None:
    sets = made.random_sets(8, 10, 3)
    some = Labelled({0: made.dataset(sets, 10)}, np.array([True] * 4 + [False] * 4))
    every = []
    for chosen in combinations(range(8), 4):
        shares = [
            [np.mean([f in sets[i] for i in side]) for f in range(10)]
            for side in (chosen, [i for i in range(8) if i not in chosen])
        ]
        every.append(max(np.subtract(*shares)))
    found = noise_test(some, 3000)
    assert found.mean == pytest.approx(np.mean(every), abs=0.01)
    assert found.p == pytest.approx(np.mean(np.array(every) >= found.found - 1e-6), abs=0.03)


def test_transfer_and_shared_features() -> None:
    one, two = seeds(seed=0), seeds(seed=7)
    matrix = transfer({"a": one, "b": two}, {"a": one, "b": two}, 1)
    assert matrix[0, 1] == f1(fit_rule(one, 1), two)
    assert matrix.shape == (2, 2)
    shared = shared_features({"a": one, "b": two}, 1, 5)
    tops = [set(np.argsort(-deltas(x.layers[1], x.labels), kind="stable")[:5]) for x in (one, two)]
    assert shared[0, 1] == pytest.approx(len(tops[0] & tops[1]) / len(tops[0] | tops[1]))
    assert shared[0, 0] == 1


def test_more_seeds_do_not_hurt() -> None:
    found = data_efficiency(seeds(60), seeds(80, 5), [3, 60], 1, repeats=8)
    assert found.shape == (2, 8)
    assert found[1].mean() >= found[0].mean()
    assert np.ptp(found[1]) == 0


def test_rates_are_those_of_the_confusion_table() -> None:
    some, test = seeds(40), seeds(50, 4)
    rule = fit_rule(some, 2)
    called, y = rule.decide(test.layers), test.labels
    found = evaluate(rule, test, fixed_fpr=0.1)
    tp, fp, fn = (called & y).sum(), (called & ~y).sum(), (~called & y).sum()
    assert found.precision.estimate == pytest.approx(tp / (tp + fp))
    assert found.recall.estimate == pytest.approx(tp / (tp + fn))
    assert found.f1.estimate == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert found.f1.low <= found.f1.estimate <= found.f1.high
    scores = rule.scores(test.layers)
    best = max((scores[y] > cut).mean() for cut in scores[~y] if (scores[~y] > cut).mean() <= 0.1)
    assert found.tpr_at_fpr is not None
    assert found.tpr_at_fpr.estimate == pytest.approx(best)


def test_baselines_separate_what_can_be_separated() -> None:
    rng = np.random.default_rng(0)
    y = np.array([True] * 40 + [False] * 40)
    x = rng.normal(size=(80, 6)).astype(np.float32)
    x[:, 2] += np.where(y, 4, -4)
    for baseline in (logistic, mean_difference):
        called, scores = baseline(x[::2], y[::2], x[1::2])
        assert (called == y[1::2]).all()
        assert ((scores > 0) == called).all()


def test_a_student_survives_its_file(tmp_path) -> None:
    texts = [f"you {w} fool {i}" for i in range(20) for w in ("big", "old")]
    texts += [f"my {w} friend {i}" for i in range(20) for w in ("dear", "good")]
    y = np.array([True] * 40 + [False] * 40)
    student = Student.fit(texts, y)
    assert (student.predict(texts) == y).all()
    student.save(tmp_path / "s.json")
    again = Student.load(tmp_path / "s.json")
    np.testing.assert_allclose(again.scores(texts), student.scores(texts), rtol=1e-12)
    for change in ({"idf": [1.0]}, {"weights": None}, {"vocabulary": [1, 2]}, {"format": "x"}, {"intercept": "inf"}):
        data = json.loads((tmp_path / "s.json").read_text()) | change
        (tmp_path / "bad.json").write_text(json.dumps(data))
        with pytest.raises(FormatError):
            Student.load(tmp_path / "bad.json")


def test_a_rule_survives_its_file_and_hostile_ones_do_not(tmp_path) -> None:
    some = seeds()
    rule = fit_rule(some, 2, name="rude").calibrated(some.negatives(), 0.1)
    rule.save(tmp_path / "r.json")
    assert Rule.load(tmp_path / "r.json") == rule
    whole = json.loads((tmp_path / "r.json").read_text())
    feature = whole["features"][0]
    for change in (
        {"format": "other"},
        {"version": 2},
        {"features": []},
        {"features": [{**feature, "layer": -1}]},
        {"features": [{**feature, "threshold": -1}]},
        {"features": [{**feature, "scale": 0}]},
        {"features": [{**feature, "threshold": "1"}]},
        {"features": [{**feature, "more": 1}]},
        {"more": 1},
    ):
        (tmp_path / "bad.json").write_text(json.dumps(whole | change))
        with pytest.raises(FormatError):
            Rule.load(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(FormatError, match="not JSON"):
        Rule.load(tmp_path / "bad.json")
    with pytest.raises(NotFoundError, match="there is no file"):
        Rule.load(tmp_path / "none.json")


def test_joined_is_one_after_the_other() -> None:
    a, b = made.dataset([{1}, {2}], name="a"), made.dataset([set(), {1, 3}], name="b")
    both = joined("both", [a, b])
    assert sets_of(both) == [{1}, {2}, set(), {1, 3}]
    assert both.ids == ("a/a0", "a/a1", "b/b0", "b/b1")
    with pytest.raises(MismatchError, match="different SAEs"):
        joined("x", [a, made.dataset([{1}], name="c", layer=3)])


def test_bad_input_is_one_sentence() -> None:
    some = seeds()
    with pytest.raises(InputError, match="both classes"):
        Labelled(some.layers, np.ones(60, bool))
    with pytest.raises(InputError, match="60 documents"):
        Labelled(some.layers, np.array([True, False]))
    with pytest.raises(InputError, match="at least one layer"):
        Labelled({}, np.array([True, False]))
    with pytest.raises(InputError, match="number of features"):
        fit_rule(some, 0)
    with pytest.raises(InputError, match="number of layers"):
        fit_rule(some, several=5)
    with pytest.raises(InputError, match="no layer 7"):
        fit_rule(some, layer=7)
    with pytest.raises(MismatchError, match="about the SAE"):
        fit_rule(some).decide({1: replace(some.layers[1], sae="x")})
    with pytest.raises(MismatchError, match="reduced by 'max'"):
        fit_rule(some).decide({1: replace(some.layers[1], reduction="any")})
    with pytest.raises(NotFoundError, match="needs layer"):
        fit_rule(some).decide({0: some.layers[0]})
    with pytest.raises(InputError, match="both classes"):
        rates(np.array([True]), np.array([True]))
    with pytest.raises(InputError, match="per class"):
        data_efficiency(some, some, [99])
    with pytest.raises(InputError, match="too few"):
        seeds(1).split(0.5)

"""Groups of documents against planted ones, restated formulas, and documents that have none."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import made
import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score

from qwen_scope.analysis import Dataset, clusters_of, grouping, weights
from qwen_scope.cli import main
from qwen_scope.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "store"))
import stores

TOPICS, OWN, WIDTH = 4, 6, 80


def planted(n: int = 60, seed: int = 0, name: str = "a", **more) -> tuple[Dataset, np.ndarray]:
    """Documents of four topics. A topic has six features, each on most of its documents; the others fire at random."""
    rng = np.random.default_rng(seed)
    topic = rng.permutation(np.arange(n) % TOPICS)
    sets = []
    for one in topic:
        own = {int(one) * OWN + i for i in range(OWN) if rng.random() < 0.8}
        sets.append(own | set(rng.choice(np.arange(TOPICS * OWN, WIDTH), 6, replace=False).tolist()))
    values = {(i, f): float(rng.uniform(0.5, 2)) for i, some in enumerate(sets) for f in some}
    return made.dataset(sets, WIDTH, name, values=values, texts=tuple(f"topic {t}" for t in topic), **more), topic


def test_planted_groups_are_found_counted_and_named() -> None:
    data, topic = planted(labels={0: "the first"})
    found = clusters_of([data]).data
    group = [one["group"] for one in found["documents"]]
    assert adjusted_mutual_info_score(topic, group) == pytest.approx(1)
    assert len(found["groups"]) == TOPICS  # nobody said how many
    assert found["chance"]["p"] == pytest.approx(1 / 20)
    sizes = [one["documents"] for one in found["groups"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == len(data)
    for one in found["groups"]:
        members = [i for i, g in enumerate(group) if g == one["group"]]
        (whose,) = {int(topic[i]) for i in members}
        assert {f["feature"] // OWN for f in one["features"]} == {whose}
        for f in one["features"]:
            fires = set(data.item[data.feature == f["feature"]].tolist())
            assert f["rate"] == pytest.approx(len(fires & set(members)) / len(members))
            assert f["elsewhere"] == pytest.approx(len(fires - set(members)) / (len(data) - len(members)))
            assert f["label"] == ("the first" if f["feature"] == 0 else None)
        above = [f["rate"] - f["elsewhere"] for f in one["features"]]
        assert all(a >= b for a, b in pairwise(above))
        assert {example["text"] for example in one["examples"]} == {f"topic {whose}"}


def test_documents_without_groups_are_told_from_them() -> None:
    noise = made.dataset(made.random_sets(60, WIDTH, 0, 0.15), WIDTH)
    result = clusters_of([noise])
    assert result.data["chance"]["p"] > 0.05
    assert "no farther apart" in result.notes[0]
    assert not clusters_of([planted()[0]]).notes


def test_weights_are_as_they_are_said() -> None:
    sets = made.random_sets(9, 7, 1)
    values = {(i, f): 0.3 + i * f for i, some in enumerate(sets) for f in some}
    data = made.dataset(sets, 7, values=values)
    expected = np.zeros((9, 7))
    for i, some in enumerate(sets):
        for f in some:
            expected[i, f] = np.sqrt(values[i, f]) * (1 + np.log(10 / (1 + sum(f in other for other in sets))))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert weights(data).toarray() == pytest.approx(expected, abs=1e-6)


def test_the_silhouette_is_rousseeuws() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(25, 6)) + np.repeat(np.eye(6)[:3], [10, 8, 7], 0) * 2
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found = grouping(x, 3, 0)
    apart, each = 1 - x @ x.T, []
    for i in range(25):
        of = [[j for j in range(25) if found.group[j] == g and j != i] for g in range(3)]
        means = [apart[i, some].mean() for some in of]
        own = means.pop(found.group[i])
        each.append((min(means) - own) / max(own, min(means)))
    assert found.silhouette == pytest.approx(np.mean(each))
    centre = x[found.group == 0].mean(0)
    assert found.near[found.group == 0] == pytest.approx(x[found.group == 0] @ centre / np.linalg.norm(centre))


def test_several_datasets_are_grouped_together() -> None:
    (one, first), (other, second) = planted(name="a"), planted(seed=1, name="b")
    found = clusters_of([one, other], groups=TOPICS, shuffles=1).data
    group = {(d["dataset"], d["id"]): d["group"] for d in found["documents"]}
    assert len(group) == len(one) + len(other)
    both = [group["a", i] for i in one.ids] + [group["b", i] for i in other.ids]
    assert adjusted_mutual_info_score(np.concatenate([first, second]), both) == pytest.approx(1)
    assert all(g["of"] == {"a": 15, "b": 15} for g in found["groups"])


def test_documents_on_which_nothing_fires_are_in_no_group() -> None:
    data, _ = planted()
    silent = made.dataset([set(), *({int(f) for f in data.feature[data.item == i]} for i in range(len(data)))], WIDTH)
    result = clusters_of([silent], shuffles=1)
    assert [d["group"] for d in result.data["documents"]].index(None) == 0
    assert "1 of 61 documents are in no group" in result.notes[-1]
    alike = clusters_of([made.dataset([{1}, {1}, {2}, {2}])], groups=3, shuffles=1)
    assert [d["group"] for d in alike.data["documents"]] in ([1, 1, 2, 2], [2, 2, 1, 1])
    assert "2 groups instead of 3" in alike.notes[-1]
    for sets, options in (([{1}, {2}], {}), ([{1}, {2}, {3}], {"groups": 3}), ([{1}, {2}, set()], {"groups": 2})):
        with pytest.raises(InputError, match="take more of them"):
            clusters_of([made.dataset(sets)], **options)
    for bad in ({"groups": 1}, {"shuffles": 0}, {"mark": 0}, {"examples": -1}):
        with pytest.raises(InputError):
            clusters_of([data], **bad)


def test_the_command_groups_a_store_with_labels_and_examples(tmp_path, capsys) -> None:
    from qwen_scope.features import Label, Notes, make_label
    from qwen_scope.stats import Interval

    score = Interval(0.9, 0.8, 1.0, 20)
    with stores.make(tmp_path / "s") as store:
        notes, info = Notes(store), store.layer(0)
        fires = sorted({int(f) for document in stores.dense(0) for f in np.flatnonzero((document > 0).any(0))})
        label = Label("words of trains", score, score, "summary", "tokens")
        notes.add(*(make_label(0, f, info.fingerprint, label) for f in fires))
    argv = ["analyze", "clusters", str(tmp_path / "s"), "--layer", "0", "--groups", "2", "--shuffles", "1"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["group"] for one in found["groups"]] == [1, 2]
    assert {f["label"] for one in found["groups"] for f in one["features"]} == {"words of trains"}
    assert {example["text"] for one in found["groups"] for example in one["examples"]} <= set(stores.TEXTS)
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert "words of trains" in capsys.readouterr().out
    assert "words of trains" in (tmp_path / "out" / "report.html").read_text()
    for bad, sentence in ((["--groups", "1"], "--groups"), (["--groups", "99"], "99 groups take more")):
        assert main([*argv, *bad]) == 2
        assert sentence in capsys.readouterr().err

"""What commands ask for, from Python: changes, targets, a sweep's recipe, and a search over texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from qwen_scope import Scope, load_scope
from qwen_scope.analysis import Rule
from qwen_scope.analysis.rule import RuleFeature
from qwen_scope.errors import InputError, MismatchError, NotFoundError, QwenScopeWarning
from qwen_scope.features import (
    Budget,
    ChangeOptions,
    Continuations,
    FindOptions,
    SweepOptions,
    TargetOptions,
    check_change,
    find,
    find_pooled,
    interventions_of,
    pool_texts,
    proposal,
    recipes_by_name,
    scored_rows,
    sinks_changed,
    sweep,
    target_of,
    text_target,
)
from qwen_scope.steer import Decoding, Intervention, Recipe, load_recipe, log_probabilities
from qwen_scope.text import Counted

PROMPTS = ["The weather is", "Guten Morgen", "1 + 1 =", "Once upon"]


@pytest.fixture(scope="module")
def scope() -> Scope:
    return load_scope(tiny.folder() / "model", tiny.folder() / "sae", device="cpu")


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        (ChangeOptions("2/5", amount=0.5), Intervention.add(layer=2, feature=5, amount=0.5, unit="resid_norm")),
        (ChangeOptions("2/5", op="scale", amount=3.0), Intervention.scale(layer=2, feature=5, amount=3.0)),
        (ChangeOptions("0/7", op="ablate"), Intervention.ablate(layer=0, feature=7)),
        (
            ChangeOptions("0/7", op="floor", amount=1.0, unit="max_act", where="thinking"),
            Intervention.floor(layer=0, feature=7, amount=1.0, unit="max_act", where="thinking"),
        ),
    ],
)
def test_a_change_is_an_intervention(scope: Scope, asked: ChangeOptions, made: Intervention) -> None:
    assert check_change(asked) == made
    assert interventions_of(scope, asked) == [made]


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        (ChangeOptions(), InputError, "feature= as LAYER/FEATURE"),
        (ChangeOptions("2/5", recipe="r.json"), InputError, "leave feature= away"),
        (ChangeOptions("2/5"), InputError, "add needs an amount="),
        (ChangeOptions("2/5", op="ablate", amount=1.0), InputError, "has no amount"),
        (ChangeOptions("2:5", amount=1.0), InputError, "LAYER/FEATURE"),
        (ChangeOptions("2/5", op="ad", amount=1.0), NotFoundError, "did you mean 'add'"),
    ],
)
def test_changes_that_mean_nothing(asked: ChangeOptions, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        check_change(asked)


def test_recipes(scope: Scope, tmp_path: Path) -> None:
    one = Intervention.ablate(layer=0, feature=7)
    Recipe.of("a", scope.model, [one], scope.saes).save(tmp_path / "a.json")
    (found,) = interventions_of(scope, ChangeOptions(recipe=tmp_path / "a.json"))
    assert found == one.bound(scope.saes[0])
    assert recipes_by_name(scope, [tmp_path / "a.json"]) == {"a": [found]}
    typical = Intervention.add(layer=0, feature=7, amount=0.1, unit="resid_norm")
    every = {0: Counted.everything()}
    Recipe.of("b", scope.model, [typical], scope.saes, counted=every).save(tmp_path / "b.json")
    with pytest.warns(QwenScopeWarning, match="its amounts stand for other sizes"):
        interventions_of(scope, ChangeOptions(recipe=tmp_path / "b.json"))
    Recipe.of("b", scope.model, [typical], scope.saes, counted=scope.counted).save(tmp_path / "b.json")
    interventions_of(scope, ChangeOptions(recipe=tmp_path / "b.json"))
    Recipe.of("a", scope.model, [one], scope.saes).save(tmp_path / "a.yaml")
    with pytest.raises(InputError, match="same file name"):
        recipes_by_name(scope, [tmp_path / "a.json", tmp_path / "a.yaml"])


def test_a_sink_that_is_changed_too_is_said(scope: Scope) -> None:
    own = Scope(scope.loaded, scope.saes)
    add = Intervention.add(layer=2, feature=5, amount=1.0)
    norms = own.capture(own.tokenize(["Guten Morgen"]), [2])[2][0].norm(dim=-1)
    assert sinks_changed(own, "Guten Morgen", [add]) == []
    own.stats.set(replace(own.stats[2], norm_median=float(norms.max()) / 50))
    (said,) = sinks_changed(own, "Guten Morgen", [add, add])
    assert f"at layers.2.resid_post token {int(norms.argmax())} is changed too" in said
    assert "is 50 times as long" in said
    for where in ("generated", "0"):
        assert sinks_changed(own, "Guten Morgen", [Intervention.add(layer=2, feature=5, amount=1.0, where=where)]) == []


def test_targets(scope: Scope) -> None:
    texts = ["a1 да", "", "Guten Morgen"]

    def values(options: TargetOptions) -> list[float]:
        return text_target(scope, options)(texts).tolist()

    assert values(TargetOptions(regex="[0-9]")) == [1, 0, 0]
    assert values(TargetOptions(script="cyrillic")) == [pytest.approx(2 / 3), 0, 0]
    # the first token does not count; without another one a text has no activation
    acts = [scope.features([text or " "], [2]).of(0, 2).to_dense()[1:] for text in texts]
    means = [float(a[:, 5].mean()) if len(a) else 0.0 for a in acts]
    assert values(TargetOptions(target_feature="2/5")) == pytest.approx(means)
    feature = int(acts[2].max(0).values.argmax())
    half = float(acts[2][:, feature].max()) / 2
    rule = Rule("r", (RuleFeature(2, feature, half, 1.0, 0.0, scope.saes[2].identity.fingerprint),))
    assert values(TargetOptions(rule=rule)) == [float((a[:, feature] > half).any()) for a in acts]
    # a rule judges the tokens that counted when it was fitted, whatever counts in the scope
    strict = replace(rule, about={"counted": Counted(first=1 + int(acts[2][:, feature].argmax()) + 1).to_json()})
    left = [acts[i][strict.counted.first - 1 :] for i in range(len(texts))]
    assert values(TargetOptions(rule=strict)) == [float((a[:, feature] > half).any()) for a in left]
    other = Rule("r", (RuleFeature(2, feature, half, 1.0, 0.0, "f" * 12),))
    with pytest.raises(MismatchError):
        text_target(scope, TargetOptions(rule=other))
    assert target_of(scope, TargetOptions(continuation=(" x",))) == Continuations((" x",))
    with pytest.raises(InputError, match="a verdict reads what is written"):
        text_target(scope, TargetOptions(continuation=(" x",)))
    for wrong in (TargetOptions(), TargetOptions(regex="a", script="latin")):
        with pytest.raises(InputError, match="name one target"):
            target_of(scope, wrong)


def test_a_sweep_becomes_a_recipe(scope: Scope, tmp_path: Path) -> None:
    made = interventions_of(scope, ChangeOptions("0/3", amount=1.0))
    told: list[tuple[str, float, str]] = []
    wide = SweepOptions((-0.5, 0.5), budget=Budget(1e9, 1.0), refine=0)
    found = sweep(
        scope,
        PROMPTS,
        made,
        Continuations((" hello",)),
        wide,
        decoding=Decoding(4),
        progress=lambda *one: told.append(one),
    )
    assert [share for _, share, _ in told] == [0.5, 1.0]
    assert {stage for stage, _, _ in told} == {"sweep"}
    assert found.best is not None
    assert found.proposed is not None
    proposal(scope, "calm", found).save(tmp_path / "calm.json")
    kept = load_recipe(tmp_path / "calm.json")
    assert kept.interventions == tuple(i.with_amount(found.proposed).bound(scope.saes[0]) for i in made)
    assert kept.effect["target"] == found.best.effect.estimate
    nothing = sweep(scope, PROMPTS, made, lambda texts: np.zeros(len(texts)), wide, decoding=Decoding(2))
    with pytest.raises(InputError, match="no recipe"):
        proposal(scope, "calm", nothing)


def test_texts_as_a_reference(scope: Scope) -> None:
    (row,) = scored_rows(scope, ["Guten Morgen"])
    assert list(row.ids) == scope.tokenizer("Guten Morgen")["input_ids"]
    assert len(log_probabilities(scope.model, [row])[0]) == len(row.ids) - 1
    assert scored_rows(scope, []) == []


def test_a_search_over_texts_is_the_search_over_their_features(scope: Scope) -> None:
    positive = [f"Guten Morgen {i}" for i in range(6)]
    negative = [f"The weather {i}" for i in range(6)]
    told: list[tuple[str, float, str]] = []
    options = FindOptions(n=3, by="auroc", seed=2)
    found = find(scope, positive, negative, [2], options, progress=lambda *one: told.append(one))
    assert found == find_pooled(pool_texts(scope, positive, [2]), pool_texts(scope, negative, [2]), options)
    assert told == [("with it", 1.0, ""), ("without it", 1.0, "")]
    with pytest.raises(InputError, match="in both sets"):
        find(scope, positive, [*negative, positive[0]])
    with pytest.raises(InputError, match="at least 4"):
        find(scope, positive, negative[:2])
    for n, level in ((0, 0.01), (3, 1.0)):
        with pytest.raises(InputError):
            FindOptions(n, level=level)

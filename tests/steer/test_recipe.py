"""Recipes: what is saved comes back, applies to its own model alone, and hostile files end in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
from families import FAMILIES

from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError, QwenScopeError
from qwen_scope.sae import Identity
from qwen_scope.steer import Intervention, Recipe, load_recipe
from qwen_scope.text import Counted


@pytest.fixture
def recipe(scope) -> Recipe:
    interventions = [
        Intervention.add(layer=2, feature=17, amount=0.5, unit="resid_norm", where="generated,0"),
        Intervention.ablate(layer=1, direction=[0.1] * tiny.D_MODEL),
    ]
    return Recipe.of("Ruhe", scope.model, interventions, scope.saes, provenance="by hand 手", effect={"share": 0.875})


@pytest.mark.parametrize("ending", ["json", "yaml", "yml"])
def test_round_trip(tmp_path, recipe, scope, ending) -> None:
    path = tmp_path / f"r.{ending}"
    recipe.save(path)
    again = load_recipe(path)
    assert again == recipe
    assert again.group == "SAE-Res-Tiny-W96-L0_6"
    again.check(scope.model, scope.saes)
    assert again.interventions == recipe.interventions


def test_it_is_for_its_own_model_and_saes(recipe, scope) -> None:
    with pytest.raises(MismatchError, match="is for the model"):
        recipe.check(FAMILIES["qwen3"](), scope.saes)
    other = {2: replace(scope.saes[2], identity=Identity("other", 2, "ff"))}
    with pytest.raises(MismatchError, match="made for the SAE"):
        recipe.check(scope.model, other)
    with pytest.raises(InputError, match="needs its SAE"):
        Recipe.of("x", scope.model, [Intervention.ablate(layer=2, feature=1)])
    with pytest.raises(InputError, match="at least one"):
        Recipe("x", "m", ())


def test_it_keeps_which_tokens_its_amounts_were_measured_on(tmp_path, scope) -> None:
    interventions = [
        Intervention.add(layer=2, feature=17, amount=0.5, unit="resid_norm"),
        Intervention.add(layer=0, feature=3, amount=2.0),
    ]
    norms = {f"layers.{layer}.resid_post": 9.0 + layer for layer in range(4)}
    counted = {layer: Counted(1, frozenset({3, 4}), norms) for layer in range(4)}
    made = Recipe.of("x", scope.model, interventions, scope.saes, counted=counted)
    assert set(made.counted) == {"layers.2.resid_post"}, "a raw amount stands for itself"
    made.save(tmp_path / "x.json")
    again = load_recipe(tmp_path / "x.json")
    assert again.counted == {"layers.2.resid_post": Counted(1, frozenset({3, 4}), {"layers.2.resid_post": 11.0})}
    assert again.differences(counted) == []
    (said,) = again.differences({2: Counted.everything()})
    assert "the first tokens of a row left out: 1 in the recipe 'x', 0 in this model" in said
    assert said.endswith("its amounts stand for other sizes")
    data = json.loads((tmp_path / "x.json").read_text())
    del data["counted"]
    (tmp_path / "old.json").write_text(json.dumps(data))
    assert load_recipe(tmp_path / "old.json").counted == {}, "recipes of before say nothing"
    data["counted"] = {"layers.2.resid_post": {"first": -1}}
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(FormatError, match="'counted' at layers"):
        load_recipe(tmp_path / "bad.json")


HOSTILE = {
    "empty.json": "",
    "list.json": "[]",
    "deep.json": "[" * 100_000,
    "nan.json": '{"version": NaN}',
    "bytes.yaml": b"\xff\xfe\x00",
    "python.yaml": "!!python/object/apply:os.system ['true']",
    "tabs.yaml": "a:\n\t- b: [",
    "old.yaml": "version: 0\n",
    "bomb.yaml": "version: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)),
    "date.yaml": "version: 2024-01-01\n",
    "digits.json": '{"version": %s}' % ("9" * 4301),
    "digits.yaml": "version: " + "9" * 4301,
    "twice.json": '{"version": 1, "version": 1}',
    "twice.yaml": "version: 1\nversion: 1\n",
    "long.json": '{"version": "%s"}' % ("x" * 10**6),
    "key.yaml": f"version: 1\n{'x' * 10**5}: 1\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, name) -> None:
    content = HOSTILE[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FormatError) as error:
        load_recipe(tmp_path / name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"name": ""},
        {"model": None},
        {"group": 4},
        {"effect": []},
        {"interventions": {}},
        {"interventions": []},
        {"interventions": ["add"]},
        {"interventions": [{"hook_point": "layer1", "op": "add", "amount": float("nan"), "feature": 1}]},
        {"version": "1"},
        {"version": True},
        {"interventions": [{"hook_point": "layer1", "op": ["x"] * 10**5, "amount": 1, "feature": 1}]},
        {"interventions": [{"hook_point": "layer1", "op": "y" * 10**6, "amount": 1, "feature": 1}]},
        {"interventions": [{"hook_point": "layer1", "op": "add", "amount": [[["z" * 100] * 100] * 100], "feature": 1}]},
        {"interventions": [{"hook_point": "layer1", "op": "add", "amount": 1, "feature": 1, "w" * 10**5: 1}]},
        {"interventions": [{"hook_point": "layer1", "op": "add", "amount": 1, "feature": 1, "where": "8" * 10**5}]},
        {"extra": 1},
    ],
    ids=lambda change: str(change)[:60],
)
def test_wrong_values(tmp_path, recipe, change) -> None:
    path = tmp_path / "r.json"
    recipe.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(QwenScopeError) as error:
        load_recipe(path)
    assert len(str(error.value)) < 400


def test_paths(tmp_path, recipe) -> None:
    with pytest.raises(NotFoundError):
        load_recipe(tmp_path / "none.json")
    with pytest.raises(InputError, match="ends in"):
        recipe.save(tmp_path / "r.txt")

"""The request field and its admission: strict JSON both ways, and one sentence for everything that cannot be served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_scope.errors import QwenScopeError
from qwen_scope.model import LayerStats
from qwen_scope.scope import Scope, load_scope
from qwen_scope.serve import Admission, Ask, ModelFacts, PromptKinds, Read, ServeSettings, write_stats
from qwen_scope.serve.protocol import fingerprint
from qwen_scope.steer import Intervention, Recipe, Where, signature
from qwen_scope.text import PHASES

WIDTH = 128
ADD = Intervention.add(layer=2, direction=[1.0] * WIDTH, amount=0.5)
CLAMP = Intervention.clamp(layer=4, feature=7, amount=2.0, where="generated,0-3")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
near = st.fixed_dictionaries(
    {},
    optional={
        "recipe": json_values,
        "interventions": st.lists(
            st.fixed_dictionaries({"hook_point": json_values, "op": json_values, "amount": json_values}) | json_values,
            max_size=3,
        )
        | json_values,
        "read": st.fixed_dictionaries({}, optional={"layers": json_values, "top": json_values, "where": json_values})
        | json_values,
        "phases": json_values,
        "ticket": json_values,
    },
)


@pytest.fixture(scope="module")
def scope() -> Scope:
    return load_scope("lab")


@pytest.fixture
def facts(scope: Scope) -> ModelFacts:
    return ModelFacts(6, WIDTH, torch.float32, 512, signature(scope.model))


@pytest.fixture
def admission(facts: ModelFacts, scope: Scope, tmp_path: Path) -> Admission:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    Recipe.of("polite", scope.model, [ADD]).save(recipes / "polite.json")
    replace(Recipe.of("other", scope.model, [ADD]), model="llama, 6 layers of 128").save(recipes / "other.json")
    (tmp_path / "stats.json").write_text(write_stats({4: scope.stats[4]}))
    settings = ServeSettings(
        sae="lab",
        layers=(2,),
        feature_layers=(4,),
        read_layers=(5,),
        recipes=str(recipes),
        stats=str(tmp_path / "stats.json"),
        rows=4,
    )
    assert ServeSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    return Admission(settings, facts)


@pytest.mark.slow
@given(near | json_values)
def test_any_json_is_an_ask_or_refused_in_one_sentence(data: Any) -> None:
    for read in (Ask.from_body, lambda value: Ask.from_text(json.dumps(value))):
        try:
            ask = read(data)
        except QwenScopeError as error:
            said = str(error)
        else:
            assert Ask.from_text(ask.to_text()) == ask
            said = "an ask"
        assert 0 < len(said) < 600


def test_an_ask_survives_its_text() -> None:
    kinds = PromptKinds.of([2, 2, 4], "default", "thinking")
    assert kinds.tokens.tolist() == [2, 2, 4]
    read = Read((4, 5), 7, (), Where.parse("prompt,9"))
    ask = Ask(interventions=(ADD, CLAMP), read=read, ticket="abc", phases=kinds)
    assert Ask.from_text(ask.to_text()) == ask
    named = Ask(read=Read.from_json({"features": ["5/9", "4/678", "4/2"]}))
    assert named.read is not None
    assert named.read.features == ((4, 2), (4, 678), (5, 9))
    assert Ask.from_text(named.to_text()) == named


def test_the_fingerprint_tells_interventions_apart_and_nothing_else() -> None:
    assert fingerprint([ADD, CLAMP]) == fingerprint([CLAMP, ADD])
    different = [ADD, CLAMP, ADD.with_amount(0.25), replace(CLAMP, where=Where.parse("all")), replace(CLAMP, feature=8)]
    assert len({fingerprint([one]) for one in different}) == len(different)
    assert Ask(interventions=(ADD,), ticket="a").fingerprint == Ask(interventions=(ADD,)).fingerprint


def test_what_a_client_may_not_say_is_refused() -> None:
    for key, value in {"ticket": "x", "phases": {}, "steer": 1}.items():
        with pytest.raises(QwenScopeError, match=f"no key '{key}'"):
            Ask.from_body({key: value})


@pytest.mark.slow
def test_admission_resolves_names_and_units(admission: Admission, scope: Scope) -> None:
    asked = Ask.from_body({"recipe": "polite", "read": {"layers": [5]}})
    admitted = admission.admit(asked, 10, 20)
    assert admitted.recipe is None
    assert admitted.interventions == (ADD,)
    assert admitted.read == Read((5,), 5, (), Where.parse("all"))
    relative = Intervention.add(layer=4, feature=7, amount=0.5, unit="resid_norm")
    (raw,) = admission.admit(Ask(interventions=(relative,)), 10, 20).interventions
    length = torch.linalg.vector_norm(scope.saes[4].W_dec[:, 7].float())
    assert raw.unit == "raw"
    assert raw.amount == pytest.approx(0.5 * scope.stats[4].norm_median / float(length))
    again = admission.admit(Ask(interventions=(raw,)), 10, 20)
    assert again.interventions == (raw,)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"recipe": "polit"}, "there is no recipe 'polit'; did you mean 'polite'"),
        ({"recipe": "../polite"}, "a recipe names one file or folder"),
        ({"recipe": "other"}, "is for the model llama"),
        ({"recipe": "polite", "interventions": [ADD.to_json()]}, "names a recipe or lists interventions"),
        ({"interventions": [ADD.at(CLAMP.hook_point).to_json() | {"direction": [1.0] * 64}]}, "has 64 numbers"),
        ({"interventions": [ADD.to_json() | {"hook_point": "layers.9.resid_post"}]}, "layer 9 is not served for add"),
        ({"interventions": [ADD.to_json() | {"hook_point": "layers.2.mlp_out"}]}, "a server changes resid_post"),
        ({"interventions": [CLAMP.to_json() | {"hook_point": "layers.2.resid_post"}]}, "not served for clamp"),
        ({"interventions": [CLAMP.to_json() | {"feature": 10**6}]}, "feature 1000000 does not exist"),
        ({"interventions": [CLAMP.to_json() | {"amount": float("nan")}]}, "finite number"),
        ({"interventions": [CLAMP.to_json() | {"amount": 1e9}]}, "absurd"),
        ({"interventions": [CLAMP.to_json() | {"where": "40"}]}, "position 40 is past the end"),
        ({"interventions": [CLAMP.to_json() | {"where": "answer"}]}, "phases of tokens are known in chats alone"),
        ({"interventions": [CLAMP.to_json(), CLAMP.to_json()]}, "set twice"),
        ({"interventions": [ADD.to_json() | {"amount": 0.5, "unit": "resid_norm"}]}, "no statistics of layer 2"),
        (
            {"interventions": [ADD.to_json() | {"where": where} for where in ("0-9", "5-12", "8-20", "generated")]},
            "overlap in",
        ),
        ({"interventions": [ADD.to_json()] * 257}, "at most 256"),
        ({"read": {"layers": [4]}}, "layer 4 is not served for reading"),
        ({"read": {"layers": [5], "top": 0}}, "of at least 1; got 0"),
        ({"read": {"features": ["5/99999999"]}}, "feature 5/99999999 does not exist"),
        ({"read": {"features": ["5/9"], "top": 3}}, "has no `layers` and no `top`"),
        ({"read": {}}, "lacks 'layers'"),
        ([], "an object"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_sentence(admission: Admission, body: Any, sentence: str) -> None:
    with pytest.raises(QwenScopeError) as caught:
        admission.admit(Ask.from_body(body), 10, 20)
    assert sentence in str(caught.value)


def test_phases_are_counted_against_the_prompt(admission: Admission) -> None:
    ask = Ask(interventions=(replace(CLAMP, where=Where.parse("answer")),))
    kinds = PromptKinds.of([PHASES.index("user")] * 9, "default", "answer")
    with pytest.raises(QwenScopeError, match="phases of 9 tokens are given for a prompt of 10"):
        admission.admit(replace(ask, phases=kinds), 10, 20)
    admitted = admission.admit(replace(ask, phases=kinds), 9, 20)
    assert admitted.phases == kinds
    assert admission.admit(replace(ask, interventions=(CLAMP,), phases=kinds), 9, 20).phases is None


def test_phases_of_generated_tokens_need_workers_that_see_them(facts: ModelFacts) -> None:
    blind = Admission(ServeSettings(sae="lab", feature_layers=(4,)), replace(facts, follows=False))
    kinds = PromptKinds.of([PHASES.index("user")] * 9, "default", "answer")
    for where, fits in (("prompt:user", True), ("answer", False)):
        ask = Ask(interventions=(replace(CLAMP, where=Where.parse(where)),), phases=kinds)
        if fits:
            assert blind.admit(ask, 9, 20).interventions == ask.interventions
            continue
        with pytest.raises(QwenScopeError, match="start the server with --no-async-scheduling"):
            blind.admit(ask, 9, 20)


def test_a_vector_too_large_for_the_served_type_is_refused(facts: ModelFacts) -> None:
    half = Admission(ServeSettings(layers=(2,)), replace(facts, dtype=torch.float16))
    with pytest.raises(QwenScopeError, match=r"too large for torch\.float16"):
        half.admit(Ask(interventions=(ADD.with_amount(1e6),)), 10, 20)


def test_amounts_after_which_a_residual_overflows_are_refused(facts: ModelFacts, admission: Admission) -> None:
    """Large but finite numbers make pre-activations overflow, which an SAE refuses: that would end the worker."""
    direction = [3e38 if i % 2 else 1.0 for i in range(facts.width)]
    for layer in (2, 4):
        far = Intervention.add(layer=layer, direction=direction, amount=1.0)
        beside = Intervention.clamp(layer=4, feature=1, amount=1.0)
        with pytest.raises(QwenScopeError, match=rf"added .* at layer {layer}; .* adds at most 1e\+15$"):
            admission.admit(Ask(interventions=(far, beside)), 10, 20)
    half = Admission(ServeSettings(layers=(2,)), replace(facts, dtype=torch.float16))
    with pytest.raises(QwenScopeError, match=r"is in float16, adds at most 4.09e\+03$"):
        half.admit(Ask(interventions=(Intervention.add(layer=2, direction=[1.0] * facts.width, amount=5e4),)), 10, 20)


def test_a_server_is_refused_what_its_model_or_saes_lack(facts: ModelFacts) -> None:
    with pytest.raises(QwenScopeError, match="there is no layer 6"):
        Admission(ServeSettings(layers=(6,)), facts)
    with pytest.raises(QwenScopeError, match="reads 128 dimensions, the model has 64"):
        Admission(ServeSettings(sae="lab", read_layers=(4,)), replace(facts, width=64))
    for wrong in ({}, {"feature_layers": (2,)}, {"layers": (2, 2)}, {"layers": (-1,)}, {"layers": (2,), "rows": 0}):
        with pytest.raises(QwenScopeError):
            ServeSettings(**wrong)


def test_statistics_are_read_back(tmp_path: Path, admission: Admission) -> None:
    assert isinstance(admission.stats[4], LayerStats)
    (tmp_path / "wrong.json").write_text('{"version": 2, "stats": []}')
    with pytest.raises(QwenScopeError, match="no statistics of version 1"):
        Admission(replace(admission.settings, stats=str(tmp_path / "wrong.json")), admission.facts)

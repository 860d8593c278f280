"""The page says what is known of the pair of model and SAEs, and what a recipe for another pair is refused with."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
import tiny

from qwen_scope import Intervention, Scope, load_scope
from qwen_scope.errors import FormatError, MismatchError
from qwen_scope.explorer import AppState, steering
from qwen_scope.explorer.api import Api
from qwen_scope.explorer.look.explore import Reading
from qwen_scope.explorer.page import pair_lines
from qwen_scope.explorer.tabs.explore import ExploreTab
from qwen_scope.model import load_model, weights_fingerprint
from qwen_scope.sae import load_sae, save_sae
from qwen_scope.scope import DO_NOT_USE, FITS, Verdict, remember
from qwen_scope.steer import Recipe
from qwen_scope.text import Counted

# The command line prints them; here they would be errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore::qwen_scope.errors.QwenScopeWarning"),
]

MODEL, SAES = str(tiny.folder() / "model"), str(tiny.folder() / "sae")
WORDS = {0: FITS, 2: DO_NOT_USE}


def opened(saes: str = SAES) -> Scope:
    return load_scope(MODEL, saes, device="cpu")


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both layers were measured, one run for each; the corpus's name is a path of this machine."""
    monkeypatch.setenv("QWEN_SCOPE_STATE", str(tmp_path / "state"))
    weights = weights_fingerprint(load_model(MODEL, device="cpu").model)
    assert weights is not None
    for layer, word in WORDS.items():
        mine = load_sae(SAES, layer).identity.fingerprint
        remember(Verdict(word, mine, weights, {layer: word}, MODEL, 12345, 67, "a<b>.jsonl", "2026-11-28"))


def test_the_header_says_verdicts_of_the_layers_that_were_opened(measured: None) -> None:
    state = AppState(opened())
    assert pair_lines(state) == ""
    state.seen("Hello there", 0)
    shown = str(pair_lines(state))
    assert "These SAEs on this model: fits at layer 0 (compared with model on 12,345 tokens" in shown
    assert "a&lt;b&gt;.jsonl" in shown
    assert MODEL not in shown
    state.seen("Hello there", 2)
    both = str(pair_lines(state))
    assert both.index("do not use at layer 2") < both.index("fits at layer 0")
    assert Api(state).info()["pair"] == state.pair()
    assert len(state.pair()) == 2


def test_a_layer_that_is_not_to_be_used_says_so_where_it_is_read(measured: None) -> None:
    state = AppState(opened())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the event loop that every page leaves to the garbage collector
        with gr.Blocks():
            tab = ExploreTab(state)
        gc.collect()
    said = {layer: str(tab.show(Reading("Hello there", "plain", layer))[tab.notice]) for layer in WORDS}
    assert said[0] == ""
    assert "These SAEs on this model: do not use at layer 2" in said[2]


def test_the_header_doubts_a_pair_that_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_SCOPE_STATE", str(tmp_path / "state"))
    save_sae([replace(tiny.random_sae(n), meta={"model": "google/gemma-2-2b"}) for n in (0, 2)], tmp_path / "sae")
    state = AppState(opened(str(tmp_path / "sae")))
    state.seen("Hello there", 0)
    assert "The SAEs were trained on another model: their files name google/gemma-2-2b" in str(pair_lines(state))
    assert str(tmp_path) not in str(pair_lines(state))


@pytest.fixture(scope="module")
def state() -> AppState:
    return AppState(opened())


def recipe(state: AppState) -> Recipe:
    scope, add = state.scope, Intervention.add(layer=0, feature=3, amount=0.2, unit="resid_norm")
    return Recipe.of("loud", scope.model, [add], scope.saes, counted=scope.counted)


def test_a_recipe_of_this_pair_is_read_without_a_word(state: AppState, tmp_path: Path) -> None:
    recipe(state).save(tmp_path / "r.json")
    name, rows, said = steering.rows_of_recipe(state, str(tmp_path / "r.json"))
    assert (name, said) == ("loud", [])
    assert [(row["layer"], row["feature"], row["amount"], row["unit"]) for row in rows] == [(0, 3, 0.2, "resid_norm")]


def test_a_recipe_of_another_pair_is_one_sentence(state: AppState, tmp_path: Path) -> None:
    whole, path = recipe(state), tmp_path / "r.json"
    (one,) = whole.interventions
    assert one.sae is not None
    other = replace(whole, interventions=(replace(one, sae=replace(one.sae, fingerprint="e" * 64)),))
    for made, says in (
        (replace(whole, model="qwen3-9-9"), "the recipe 'loud' is for the model qwen3-9-9, this one is qwen3"),
        (other, "the intervention is made for the SAE .*, this one is SAE-Res-Tiny-W96-L0_6"),
    ):
        made.save(path)
        with pytest.raises(MismatchError, match=says) as caught:
            steering.rows_of_recipe(state, str(path))
        assert "\n" not in str(caught.value)
    path.write_text("{")
    with pytest.raises(FormatError):
        steering.rows_of_recipe(state, str(path))


def test_a_recipe_measured_on_other_tokens_is_read_with_a_note(state: AppState, tmp_path: Path) -> None:
    whole = recipe(state)
    (at,) = whole.counted
    replace(whole, counted={at: Counted(first=0)}).save(tmp_path / "r.json")
    _, rows, said = steering.rows_of_recipe(state, str(tmp_path / "r.json"))
    assert len(rows) == 1
    assert len(said) == 1
    assert said[0].startswith(
        "the recipe 'loud' and this model count other tokens: the first tokens of a row left out: 0"
    )
    assert said[0].endswith("its amounts stand for other sizes")

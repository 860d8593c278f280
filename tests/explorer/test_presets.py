"""What the page offers to begin with works at the first click."""

from __future__ import annotations

import pytest

from qwen_scope import load_scope
from qwen_scope.explorer import AppState, steering
from qwen_scope.explorer.presets import PRESETS, PROMPT
from qwen_scope.lab import language_of_text
from qwen_scope.model import blocks
from qwen_scope.steer import Decoding


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_turns_texts_into_its_language(state: AppState, name: str) -> None:
    language, layer, feature, amount = PRESETS[name]
    row = state.presets[name]
    assert (row["layer"], row["feature"], row["amount"]) == (layer, feature, amount)
    chosen = steering.interventions(state, [row])
    how = steering.decoding(state, {"max_new_tokens": 60, "sample": True})
    first, before = (steering.continued(state, PROMPT, "plain", those, how) for those in (chosen, []))
    assert language_of_text(first.text) == language != language_of_text(before.text)

    prompts = steering.sweep_prompts(state, PROMPT, "")
    some = Decoding(24, sample=True, seed=1)
    steered, plain = (state.scope.generate(prompts, those, decoding=some) for those in (chosen, []))
    shares = [sum(language_of_text(one.text) == language for one in made) / len(made) for made in (steered, plain)]
    assert shares[0] >= 0.5
    assert shares[1] < 0.3


def test_presets_go_with_the_layers_there_are(state: AppState) -> None:
    assert state.default_intervention() == next(iter(state.presets.values()))
    assert list(state.presets) == list(PRESETS)


def test_a_warm_page_has_measured_what_the_first_click_counts_in() -> None:
    """On a large model the first steered token would wait for it, and for the kernels that read many tokens."""
    own = AppState(load_scope("lab", device="cpu"))
    own.warm()
    read: list[int] = []
    blocks(own.scope.model)[0].register_forward_pre_hook(lambda *_: read.append(1))
    steering.measure(own, steering.interventions(own, [own.default_intervention()]))
    assert read == []


def test_features_to_try_are_named_in_words_languages_first(state: AppState) -> None:
    names = [one["name"] for one in state.known]
    assert "German" in names[:8]
    assert "rude Russian" in names[12:]
    assert not any("/" in name for name in names)

"""Groups of SAEs with one layer, or with some."""

from __future__ import annotations

import shutil
from pathlib import Path

import gradio as gr
import pytest

from qwen_scope import load_scope
from qwen_scope.errors import InputError, QwenScopeError
from qwen_scope.explorer import Api, AppState
from qwen_scope.explorer.page import build
from qwen_scope.explorer.tabs.explore import layer_choice
from qwen_scope.scope import model_source


@pytest.mark.slow
@pytest.mark.parametrize("layers", [[0], [5], [1, 4], [0, 2, 3, 5]])
def test_groups_with_one_layer_or_scattered_layers_have_a_page(tmp_path: Path, layers: list[int]) -> None:
    source = Path(model_source("lab")).parent / "sae"
    for name in ("config.json", *(f"layer{layer}.sae.pt" for layer in layers)):
        shutil.copy(source / name, tmp_path / name)
    state = AppState(load_scope("lab", sae=str(tmp_path), device="cpu"))
    assert state.layers == layers
    state.warm()
    build(state)
    api = Api(state)
    assert api.info()["layers"] == layers
    for layer in layers:
        assert api.features("Hello there", layer)["layer"] == layer
        assert api.feature(layer, 3)["feature"] == 3
    assert {one["layer"] for one in api.compare(["Hello"], ["Hallo"])} == set(layers)
    with pytest.raises(QwenScopeError, match="no SAE for layer"):
        api.features("Hello", 99)
    with pytest.raises(InputError, match="no layer from 6 to 6"):
        state.layer_range(6, 6)


def test_a_layer_is_chosen_among_those_there_are() -> None:
    with gr.Blocks():
        slider, one, some = (layer_choice(layers) for layers in ([2, 3, 4], [7], [1, 4, 5]))
    assert isinstance(slider, gr.Slider)
    assert (slider.minimum, slider.maximum, slider.value) == (2, 4, 3)
    assert isinstance(one, gr.Dropdown)
    assert isinstance(some, gr.Dropdown)
    assert [value for _, value in one.choices] == [7]
    assert [value for _, value in some.choices] == [1, 4, 5]
    assert some.value == 4

import pickle

import pytest

from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint


@pytest.mark.parametrize(
    "text",
    [
        "12",
        "layer12",
        "layer_12",
        "layers.12",
        "layers.12.resid_post",
        "blocks.12.hook_resid_post",
        "blocks.12.resid_post",
        "model.layers.12",
        "model.language_model.layers.12",
        "language_model.model.layers.12",
        "base_model.model.model.layers.12",
        "transformer.h.12",
        " layers.12 ",
    ],
)
def test_every_tools_name_means_the_same_place(text):
    assert HookPoint.parse(text) == HookPoint(12)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a hook point"),
        ("twelve", "not a hook point"),
        ("-1", "not a hook point"),
        ("1.5", "not a hook point"),
        ("layer12.sae.pt", "not a hook point"),
        ("model.visual.blocks.3", "not a hook point"),  # the vision tower has no residual stream of ours
        ("model.layers.12.mlp.experts.3", "not a hook point"),
        ("layers.١٢", "not a hook point"),
        ("model.layers.12.mlp", "unknown stream 'mlp'"),
        ("blocks.12.hook_mlp_out", "unknown stream 'mlp_out'"),
        ("blocks.12.hook_resid_pre", "same residual as 'layers.11.resid_post'"),
        ("layers.0.resid_pre", "unknown stream 'resid_pre'"),
    ],
)
def test_other_names_are_refused_with_what_fits(text, says):
    with pytest.raises(InputError, match=says) as caught:
        HookPoint.parse(text)
    assert "resid_post" in str(caught.value)


@pytest.mark.parametrize("layer", [-1, True])
def test_a_layer_counts_from_zero(layer):
    with pytest.raises(InputError, match="whole number"):
        HookPoint(layer)


def test_it_is_a_value():
    point = HookPoint(2)
    assert str(point) == "layers.2.resid_post"
    assert HookPoint.parse(str(point)) == point
    assert point.transformer_lens == "blocks.2.hook_resid_post"
    assert HookPoint.parse(point.transformer_lens) == point
    assert {point: 1}[HookPoint(2)] == 1
    assert sorted([HookPoint(10), HookPoint(9)]) == [HookPoint(9), HookPoint(10)]
    assert pickle.loads(pickle.dumps(point)) == point
    with pytest.raises(AttributeError):
        point.layer = 3

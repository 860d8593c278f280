import pickle

import pytest

from qwen_scope.errors import InputError, MismatchError
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
        ("blocks.12.hook_resid_mid", "unknown stream 'resid_mid'"),
        ("blocks.12.attn.hook_z", "not a hook point"),
        ("blocks.12.ln1.hook_normalized", "not a hook point"),
        ("blocks.12.mlp.hook_post", "not a hook point"),
        ("model.layers.12.mlp.down_proj", "not a hook point"),
        ("model.layers.12.input_layernorm", "unknown stream 'input_layernorm'"),
        ("blocks.12.hook_resid_pre", "same residual as 'layers.11.resid_post'"),
        ("layers.0.resid_pre", "unknown stream 'resid_pre'"),
    ],
)
def test_other_names_are_refused_with_what_fits(text, says):
    with pytest.raises(InputError, match=says) as caught:
        HookPoint.parse(text)
    assert "resid_post" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "stream"),
    [
        ("layers.12.mlp_out", "mlp_out"),
        ("blocks.12.hook_mlp_out", "mlp_out"),
        ("model.layers.12.mlp", "mlp_out"),
        ("model.language_model.layers.12.feed_forward", "mlp_out"),
        ("layers.12.attn_out", "attn_out"),
        ("blocks.12.hook_attn_out", "attn_out"),
        ("model.layers.12.self_attn", "attn_out"),
        ("model.layers.12.linear_attn", "attn_out"),
        ("transformer.h.12.attn", "attn_out"),
        ("gpt_neox.layers.12.attention", "attn_out"),
    ],
)
def test_parts_of_a_block_have_names_too(text, stream):
    point = HookPoint.parse(text)
    assert point == HookPoint(12, stream)
    assert HookPoint.parse(str(point)) == point
    assert HookPoint.parse(point.transformer_lens) == point


def test_an_sae_reads_at_its_own_layer():
    assert HookPoint.read_by(None, 4) == HookPoint(4)
    assert HookPoint.read_by("layers.4.mlp_out", 4) == HookPoint(4, "mlp_out")
    with pytest.raises(MismatchError, match=r"at layer 4 reads layers\.3\.mlp_out"):
        HookPoint.read_by("layers.3.mlp_out", 4)


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

"""Where an SAE's files say that it reads, in every tool's spelling: kept, moved to its equal, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_toys import residuals, toy
from safetensors.torch import save_file

from qwen_scope.errors import FormatError, InputError, QwenScopeError
from qwen_scope.sae import LAYOUTS, SAE, layers_of, load_sae, save_sae
from qwen_scope.sae.formats import hooks

REFUSED = [
    "blocks.3.attn.hook_z",
    "blocks.3.attn.hook_q",
    "blocks.3.ln1.hook_normalized",
    "blocks.3.ln2.hook_normalized",
    "blocks.3.hook_resid_mid",
    "blocks.3.hook_mlp_in",
    "blocks.3.hook_attn_in",
    "blocks.3.mlp.hook_post",
    "blocks.3.mlp.hook_pre",
    "model.layers.3.mlp.down_proj",
    "model.layers.3.mlp.experts.5",
    "model.layers.3.input_layernorm",
    "model.layers.3.self_attn.o_proj",
    "hook_embed",
    "ln_final.hook_normalized",
    "lm_head",
    "model.visual.blocks.3",
    "model.vision_tower.encoder.layers.3",
    "blocks.0.hook_resid_pre",
    "blocks.3.hook_resid_posts",
]
READ = [
    ("blocks.3.hook_resid_post", 3, "resid_post"),
    ("model.layers.3", 3, "resid_post"),
    ("model.language_model.layers.3", 3, "resid_post"),
    ("transformer.h.3", 3, "resid_post"),
    ("model.layers[3]", 3, "resid_post"),
    ("blocks.4.hook_resid_pre", 3, "resid_post"),
    ("layers.4.resid_pre", 3, "resid_post"),
    ("blocks.3.hook_mlp_out", 3, "mlp_out"),
    ("model.layers.3.mlp", 3, "mlp_out"),
    ("model.layers.3.feed_forward", 3, "mlp_out"),
    ("blocks.3.hook_attn_out", 3, "attn_out"),
    ("model.layers.3.self_attn", 3, "attn_out"),
    ("model.layers.3.linear_attn", 3, "attn_out"),
    ("gpt_neox.layers.3.attention", 3, "attn_out"),
]


def sae_lens(folder: Path, sae: SAE | None = None, /, **config: Any) -> Path:
    sae = sae or toy()
    folder.mkdir(parents=True)
    tensors = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec.T, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae_weights.safetensors")
    said = {"architecture": "topk", "k": 5, "d_in": 16, "d_sae": 64, "apply_b_dec_to_input": False}
    (folder / "cfg.json").write_text(json.dumps(said | config))
    return folder


def sparsify(folder: Path) -> Path:
    """As its own `save_to_disk` leaves it: the place stands in the folder's name alone."""
    sae = toy()
    folder.mkdir(parents=True)
    tensors = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec.T, "b_dec": sae.b_dec}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"activation": "topk", "k": 5, "d_in": 16, "num_latents": 64}))
    return folder


def dictionary(folder: Path, buffer: dict | None = None, **trainer: object) -> Path:
    sae = toy()
    folder.mkdir(parents=True)
    named = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "decoder.weight": sae.W_dec, "b_dec": sae.b_dec}
    torch.save(named | {"k": torch.tensor(5)}, folder / "ae.pt")
    config = {"trainer": {"trainer_class": "TopKTrainer", "k": 5, **trainer}} | ({"buffer": buffer} if buffer else {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("name", "layer", "stream"), READ)
def test_sae_lens_hook_names(tmp_path: Path, name: str, layer: int, stream: str) -> None:
    for i, config in enumerate(({"hook_name": name}, {"metadata": {"hook_name": name}}, {"hook_point": name})):
        sae = load_sae(sae_lens(tmp_path / str(i), **config))
        assert (sae.hook_point, sae.identity.layer) == (f"layers.{layer}.{stream}", layer)


@pytest.mark.parametrize("name", REFUSED)
def test_other_places_are_refused_by_name(tmp_path: Path, name: str) -> None:
    for i, config in enumerate(({"hook_name": name}, {"metadata": {"hf_hook_name": name}})):
        with pytest.raises(FormatError) as caught:
            load_sae(sae_lens(tmp_path / str(i), **config))
        assert name in str(caught.value)


@pytest.mark.parametrize(("name", "layer", "stream"), [row for row in READ if "[" not in row[0]])
def test_sparsify_folder_names(tmp_path: Path, name: str, layer: int, stream: str) -> None:
    sae = load_sae(sparsify(tmp_path / name))
    assert (sae.hook_point, sae.identity.layer) == (f"layers.{layer}.{stream}", layer)
    assert layers_of(tmp_path) == [layer]
    assert load_sae(tmp_path, layer).hook_point == f"layers.{layer}.{stream}"


@pytest.mark.parametrize("name", ["layers.4.mlp.down_proj", "layers.4.input_layernorm", "h.4.ln_1", "layers.4.mlp.act"])
def test_sparsify_folders_of_other_modules_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match=f"'{name}' can't be read"):
        load_sae(sparsify(tmp_path / name))


@pytest.mark.parametrize(
    ("trainer", "folder", "expected"),
    [
        ({"layer": 3, "submodule_name": "resid_post_layer_3"}, "a", "layers.3.resid_post"),
        ({"layer": 3, "submodule_name": "mlp_out_layer_3"}, "a", "layers.3.mlp_out"),
        ({"layer": 3, "submodule_name": "mlp_out"}, "a", "layers.3.mlp_out"),
        ({"layer": 3, "submodule_name": "attn_out"}, "a", "layers.3.attn_out"),
        ({"layer": 3, "submodule_name": "mlp_layer3"}, "a", "layers.3.mlp_out"),
        ({"layer": 4, "submodule_name": "resid_pre_layer_4"}, "a", "layers.3.resid_post"),
        ({"layer": 4, "submodule_name": "resid_pre"}, "a", "layers.3.resid_post"),
        ({"layer": 3, "submodule_name": "model.layers.3.mlp"}, "a", "layers.3.mlp_out"),
        ({"layer": 3}, "mlp_out_layer_3/trainer_0", "layers.3.mlp_out"),
        ({"layer": 3}, "attn_out_layer3/10_32768", "layers.3.attn_out"),
        ({"layer": 3}, "trainer_0", "layers.3.resid_post"),
    ],
)
def test_dictionary_learning_submodules(tmp_path: Path, trainer: dict, folder: str, expected: str) -> None:
    dictionary(tmp_path / folder, **trainer)
    sae = load_sae(tmp_path)
    assert (sae.hook_point, sae.identity.layer) == (expected, 3)


@pytest.mark.parametrize(
    ("trainer", "buffer", "says"),
    [
        ({"layer": 3, "submodule_name": "hook_z"}, None, "hook_z"),
        ({"layer": 3, "submodule_name": "mlp_in_layer_3"}, None, "mlp_in_layer_3"),
        ({"layer": 4, "submodule_name": "mlp_out_layer_3"}, None, "trainer's layer is 4"),
        ({"layer": 3, "submodule_name": "resid_pre_layer_4"}, None, "trainer's layer is 3"),
        ({"layer": 0, "submodule_name": "resid_pre"}, None, "input of layer 0"),
        ({"layer": 3, "submodule_name": "mlp_out"}, {"io": "in"}, "io='in'"),
        ({"layer": 3, "submodule_name": "resid_post_layer_3"}, {"io": "in_and_out"}, "io='in_and_out'"),
    ],
)
def test_dictionary_learning_refuses_by_name(tmp_path: Path, trainer: dict, buffer: dict | None, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        load_sae(dictionary(tmp_path / "a", buffer, **trainer))


def test_the_input_of_a_layer_is_the_output_of_the_one_before(tmp_path: Path) -> None:
    sae = load_sae(dictionary(tmp_path / "a", {"io": "in"}, layer=4, submodule_name="model.layers.4"))
    assert (sae.hook_point, sae.identity.layer) == ("layers.3.resid_post", 3)


@pytest.mark.parametrize("folder", ["blocks.4.hook_resid_pre", "layer_4", "gpt2/blocks.4.hook_resid_pre", "any"])
def test_a_listing_counts_the_input_of_a_layer_to_the_one_before(tmp_path: Path, folder: str) -> None:
    sae_lens(tmp_path / "g" / folder, hook_name="blocks.4.hook_resid_pre")
    sae_lens(tmp_path / "g" / "other", toy(layer=7), hook_name="blocks.7.hook_resid_post")
    assert layers_of(tmp_path / "g") == [3, 7]
    assert load_sae(tmp_path / "g", 3).hook_point == "layers.3.resid_post"
    with pytest.raises(QwenScopeError, match="no SAE for layer 4; it has layers 3, 7"):
        load_sae(tmp_path / "g", 4)


def test_two_streams_of_one_layer_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    sparsify(tmp_path / "layers.4")
    sparsify(tmp_path / "layers.4.mlp")
    with pytest.raises(InputError, match=r"several SAEs for layer 4, name one as layer=: 'layers\.4\.mlp', 'lay"):
        load_sae(tmp_path, 4)
    assert load_sae(tmp_path, "layers.4.mlp").hook_point == "layers.4.mlp_out"
    assert load_sae(tmp_path, "layers.4").hook_point == "layers.4.resid_post"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"hook_name": "blocks.3.hook_resid_post", "hook_layer": 5}, "hook_layer is 5"),
        (
            {"metadata": {"hook_name": "blocks.3.hook_mlp_out", "hf_hook_name": "model.layers.3"}},
            r"layers\.3\.mlp_out.*layers\.3\.resid_post",
        ),
        ({"metadata": {"hook_name": "blocks.3.hook_mlp_out", "hf_hook_name": "model.layers.4.mlp"}}, "contradicts"),
    ],
)
def test_names_that_contradict_each_other(tmp_path: Path, config: dict, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        load_sae(sae_lens(tmp_path / "a", **config))


def test_a_layer_in_the_folder_that_is_not_the_hooks(tmp_path: Path) -> None:
    for name in ("layer_5", "blocks.5.hook_resid_post", "layers.5.mlp"):
        sae_lens(tmp_path / name, hook_name="blocks.3.hook_resid_post")
        with pytest.raises(FormatError, match="is named for layer 5, but its config says layer 3"):
            load_sae(tmp_path / name)
        with pytest.raises(FormatError, match="contradicts itself: it is of layer 5, and it says that it reads"):
            load_sae(tmp_path, name)


@pytest.mark.parametrize("stream", hooks.STREAMS)
@pytest.mark.parametrize("first", list(LAYOUTS))
@pytest.mark.parametrize("second", list(LAYOUTS))
def test_every_layout_writes_where_an_sae_reads(tmp_path: Path, stream: str, first: str, second: str) -> None:
    sae = replace(toy(), hook_point=f"layers.3.{stream}")
    save_sae(sae, tmp_path / "a", first)
    save_sae(load_sae(tmp_path / "a"), tmp_path / "b", second)
    back = load_sae(tmp_path / "b")
    assert (back.hook_point, back.identity) == (sae.hook_point, sae.identity)
    torch.testing.assert_close(back.pre_acts(residuals()), sae.pre_acts(residuals()), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "key", "expected"),
    [
        ("sae_lens", ("metadata", "hook_name"), "blocks.3.hook_mlp_out"),
        ("sae_lens", ("metadata", "hf_hook_name"), "model.layers.3.mlp"),
        ("sparsify", ("hookpoint",), "layers.3.mlp"),
        ("dictionary_learning", ("trainer", "submodule_name"), "mlp_out_layer_3"),
        ("official", ("hook_point",), "mlp_out"),
    ],
)
def test_other_tools_are_told_in_their_own_spelling(tmp_path: Path, layout: str, key: tuple, expected: str) -> None:
    save_sae(replace(toy(), hook_point="layers.3.mlp_out"), tmp_path, layout)
    config = json.loads((tmp_path / LAYOUTS[layout].config_name).read_text())
    for part in key:
        config = config[part]
    assert config == expected


def test_the_spelling_of_transformers_that_came_is_kept(tmp_path: Path) -> None:
    twin = "model.language_model.layers.3.linear_attn"
    source = sae_lens(tmp_path / "a", metadata={"hook_name": "blocks.3.hook_attn_out", "hf_hook_name": twin})
    save_sae(load_sae(source), tmp_path / "b", "sae_lens")
    assert json.loads((tmp_path / "b" / "cfg.json").read_text())["metadata"]["hf_hook_name"] == twin


def test_several_layers_of_one_part_share_a_folder(tmp_path: Path) -> None:
    saes = [replace(toy(layer=n), hook_point=f"layers.{n}.attn_out") for n in (1, 6)]
    for layout in ("official", "sparsify", "sae_lens"):
        save_sae(saes, tmp_path / layout, layout)
        assert [load_sae(tmp_path / layout, n).hook_point for n in (1, 6)] == ["layers.1.attn_out", "layers.6.attn_out"]
    assert (tmp_path / "sparsify" / "layers.6.self_attn" / "sae.safetensors").is_file()
    with pytest.raises(QwenScopeError, match="hook_point"):
        save_sae(toy(layer=2), tmp_path / "official")


@pytest.mark.parametrize(
    ("hook_point", "says"),
    [
        ("resid_pre", "can't say resid_pre"),
        ("ln1", "'ln1' can't be read"),
        ("blocks.3.attn.hook_z", "hook_z"),
        ("layers.5.resid_post", "it is of layer 3"),
    ],
)
def test_the_official_layout_refuses_other_places_too(tmp_path: Path, hook_point: str, says: str) -> None:
    save_sae(toy(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hook_point": hook_point}))
    with pytest.raises(FormatError, match=says):
        load_sae(tmp_path)

"""Every layout, written and read back, in every stored type; and the folds against float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_toys import GROUP, residuals, toy
from safetensors.torch import save_file

from qwen_scope.errors import FormatError, InputError, MismatchError, QwenScopeWarning
from qwen_scope.sae import LAYOUTS, SAE, compare_saes, layers_of, load_sae, save_sae

FOLDED = {("sparsify", "topk"), ("dictionary_learning", "topk")}
KINDS = ("topk", "jumprelu")
CASES = [(layout, kind) for layout in LAYOUTS for kind in KINDS if kind in (LAYOUTS[layout].kinds or KINDS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_round_trip(tmp_path: Path, layout: str, kind: str, dtype: torch.dtype) -> None:
    sae = toy(kind)
    save_sae(sae, tmp_path / "out", layout, dtype)
    back = load_sae(tmp_path / "out")
    assert back.identity == sae.identity, "a copy in another type or layout is the same SAE"
    assert (back.hook_point, back.k, back.architecture) == (sae.hook_point, sae.k, sae.architecture)
    assert back.dtype == dtype
    expected = sae.to(dtype=dtype)
    assert torch.equal(back.W_enc, expected.W_enc)
    assert torch.equal(back.W_dec, expected.W_dec)
    assert torch.equal(back.b_dec, expected.b_dec)
    if (layout, kind) in FOLDED:
        torch.testing.assert_close(back.b_enc, expected.b_enc, rtol=0, atol=2e-6)
    else:
        assert torch.equal(back.b_enc, expected.b_enc)
    found = compare_saes(expected, back, residuals())
    assert found.jaccard == 1.0
    assert found.value_error < 1e-6


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_several_layers_and_one_more_later(tmp_path: Path, layout: str, kind: str) -> None:
    save_sae([toy(kind, layer=7), toy(kind, layer=1)], tmp_path / "out", layout)
    save_sae(toy(kind, layer=12), tmp_path / "out", layout)
    assert layers_of(tmp_path / "out") == [1, 7, 12]
    for layer in (1, 7, 12):
        assert load_sae(tmp_path / "out", layer).identity == toy(kind, layer=layer).identity
    with pytest.raises(InputError, match="layers 1, 7, 12"):
        load_sae(tmp_path / "out")


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_identity_survives_a_chain_of_conversions(tmp_path: Path, first: str, second: str) -> None:
    sae = toy()
    save_sae(sae, tmp_path / "a", first, torch.bfloat16)
    save_sae(load_sae(tmp_path / "a"), tmp_path / "b", second, torch.float32)
    assert load_sae(tmp_path / "b").identity == sae.identity


def plain_official(folder: Path, sae: SAE, config: dict | None) -> Path:
    """A folder as the SAEs were released: nothing of this package in it."""
    folder.mkdir(exist_ok=True)
    torch.save({n: getattr(sae, n) for n in ("W_enc", "W_dec", "b_enc", "b_dec")}, folder / "layer3.sae.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_released_folder(tmp_path: Path) -> None:
    sae = toy()
    back = load_sae(plain_official(tmp_path / "SAE-Res-Toy-W1K-L0_5", sae, {"k": 5, "hook_point": "resid_post"}))
    assert back.identity == sae.identity, "group, layer and fingerprint follow from the files"
    assert back.hook_point == "layers.3.resid_post"
    assert torch.equal(back.W_enc, sae.W_enc)


def test_k_comes_from_the_config_or_the_name_or_is_asked_for(tmp_path: Path) -> None:
    named = plain_official(tmp_path / "SAE-Res-Toy-W1K-L0_7", toy(), None)
    assert load_sae(named).k == 7
    assert load_sae(named / "layer3.sae.pt").k == 7
    assert load_sae(named, k=7).k == 7
    with pytest.raises(InputError, match=r"k=5 was asked for, but .* k=7 according to its name 'SAE-Res-Toy-W1K-L0_7'"):
        load_sae(named, k=5)
    plain_official(named, toy(), {"k": 9})
    with pytest.warns(QwenScopeWarning, match=r"the name 'SAE-Res-Toy-W1K-L0_7' says k=7, but .* config says k=9,"):
        assert load_sae(named).k == 9
    with pytest.raises(InputError, match=r"k=7 was asked for, but .* k=9 according to its config"):
        load_sae(named, k=7)
    nameless = plain_official(tmp_path / "mine", toy(), {})
    with pytest.raises(InputError, match="pass k="):
        load_sae(nameless)
    assert load_sae(nameless, k=4).k == 4
    save_sae(toy("jumprelu"), tmp_path / "jump")
    with pytest.raises(InputError, match="no k"):
        load_sae(tmp_path / "jump", k=5)


def sae_lens_folder(folder: Path, sae: SAE, **config: object) -> Path:
    """Weights in sae_lens' orientation under a config given key by key."""
    folder.mkdir(parents=True)
    tensors = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec.T, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    if sae.architecture == "jumprelu":
        tensors["threshold"] = sae.threshold  # type: ignore[attr-defined]
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": 16, "d_sae": 64, **config}))
    return folder


def sae_lens_topk(sae: SAE, x: torch.Tensor, subtract: bool, rescale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense features and reconstruction as sae_lens defines them, in float64."""
    W_enc, W_dec, b_enc, b_dec = (t.double() for t in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    norms = W_dec.norm(dim=0) if rescale else torch.ones(len(b_enc), dtype=torch.float64)
    pre = ((x.double() - b_dec * subtract) @ W_enc.T + b_enc) * norms
    values, indices = pre.topk(5, dim=-1)
    acts = torch.zeros_like(pre).scatter_(-1, indices, values.relu())
    return acts, (acts / norms) @ W_dec.T + b_dec


@pytest.mark.parametrize(
    ("config", "subtract", "rescale"),
    [
        ({"architecture": "topk", "k": 5, "apply_b_dec_to_input": False}, False, False),
        ({"architecture": "topk", "k": 5, "apply_b_dec_to_input": True}, True, False),
        ({"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True}, True, True),
        ({"architecture": "topk", "k": 5, "metadata": {"sae_lens_version": "6.3.0"}}, True, False),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "architecture": "standard"}, True, False),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 5}, "apply_b_dec_to_input": False}, False, False),
    ],
)
def test_sae_lens_configs_old_and_new_fold_exactly(tmp_path: Path, config: dict, subtract: bool, rescale: bool) -> None:
    sae, x = toy(), residuals()
    back = load_sae(sae_lens_folder(tmp_path / "s", sae, hook_name="blocks.3.hook_resid_post", **config))
    acts, recon = sae_lens_topk(sae, x, subtract, rescale)
    found = back.encode(x)
    torch.testing.assert_close(found.to_dense().double(), acts, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(back.decode(found).double(), recon, rtol=1e-5, atol=1e-4)
    assert (back.hook_point, back.identity.layer) == ("layers.3.resid_post", 3)


def test_the_folds_are_right_to_the_last_bit_of_fp32(tmp_path: Path) -> None:
    sae = toy()
    back = load_sae(sae_lens_folder(tmp_path / "s", sae, architecture="topk", k=5, rescale_acts_by_decoder_norm=True))
    W_enc, W_dec, b_enc, b_dec = (t.double() for t in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    norms = W_dec.norm(dim=0)
    assert torch.equal(back.W_enc, (W_enc * norms[:, None]).float())
    torch.testing.assert_close(back.W_dec.double(), W_dec / norms, rtol=1.2e-7, atol=0)
    torch.testing.assert_close(back.b_enc.double(), (b_enc - W_enc @ b_dec) * norms, rtol=2.4e-7, atol=0)


def test_open_interpretability_keeps_all_layers_in_one_folder(tmp_path: Path) -> None:
    """sae_L11_latest.safetensors beside sae_L11_cfg.json, a config without version or `apply_b_dec_to_input`."""
    for layer in (11, 31, 55):
        part = sae_lens_folder(tmp_path / f"part{layer}", toy(layer=layer))
        (tmp_path / "repo").mkdir(exist_ok=True)
        (part / "sae_weights.safetensors").rename(tmp_path / "repo" / f"sae_L{layer}_latest.safetensors")
        config = {"architecture": "topk", "d_in": 16, "d_sae": 64, "k": 5, "k_aux": 8, "activation_fn_str": "relu"}
        config |= {"hook_name": f"model.language_model.layers.{layer}", "model_name": "Qwen/Qwen3.6-27B"}
        (tmp_path / "repo" / f"sae_L{layer}_cfg.json").write_text(json.dumps(config))
        (tmp_path / "repo" / f"sae_L{layer}_resume.pt").write_bytes(b"never opened")
    assert layers_of(tmp_path / "repo") == [11, 31, 55]
    back = load_sae(tmp_path / "repo", "model.language_model.layers.31")
    assert (back.hook_point, back.k, back.meta["model"]) == ("layers.31.resid_post", 5, "Qwen/Qwen3.6-27B")
    x = residuals()
    acts, _ = sae_lens_topk(toy(layer=31), x, subtract=True, rescale=False)
    torch.testing.assert_close(back.encode(x).to_dense().double(), acts, rtol=1e-5, atol=1e-4)


def test_a_repository_of_sae_lens_folders_is_asked_by_layer_or_by_folder(tmp_path: Path) -> None:
    said = {"architecture": "topk", "k": 5}
    sae_lens_folder(tmp_path / "layer_2" / "width_64", toy(layer=2), hook_name="blocks.2.hook_resid_post", **said)
    sae_lens_folder(tmp_path / "layer_4" / "a", toy(layer=4), hook_name="blocks.4.hook_resid_post", **said)
    sae_lens_folder(tmp_path / "layer_4" / "b", toy(layer=5), hook_name="blocks.4.hook_resid_post", **said)
    sae_lens_folder(tmp_path / "unnamed", toy(layer=6), metadata={"hook_name": "blocks.6.hook_resid_post"}, **said)
    assert layers_of(tmp_path) == [2, 4, 6]
    assert load_sae(tmp_path, 6).identity.layer == 6
    with pytest.raises(InputError, match="'layer_4/a', 'layer_4/b'"):
        load_sae(tmp_path, 4)
    assert torch.equal(load_sae(tmp_path, "layer_4/b").W_enc, toy(layer=5).W_enc)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm' can't be read"),
        ({"normalize_activations": True}, "normalize_activations=True can't be read"),
        ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
        ({"hook_name": "blocks.3.attn.hook_z"}, "reshapes attention heads"),
        ({"architecture": "transcoder"}, "architecture 'transcoder' can't be read"),
        ({"architecture": "gated"}, "architecture 'gated'"),
        ({"architecture": "standard"}, "architecture 'standard'"),
        ({"d_out": 16}, "d_out=16"),
        ({"hook_name_out": "blocks.3.hook_mlp_out"}, "hook_name_out"),
        ({"k": "five"}, "'k' in the config must be a positive whole number"),
    ],
)
def test_what_sae_lens_does_at_run_time_is_refused(tmp_path: Path, config: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        load_sae(sae_lens_folder(tmp_path / "s", toy(), **({"architecture": "topk", "k": 5} | config)))


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("sparsify", {"activation": "groupmax"}, "activation='groupmax'"),
        ("sparsify", {"signed": True}, "signed=True"),
        ("sparsify", {"skip_connection": True}, "skip_connection=True"),
        ("sparsify", {"transcode": True}, "transcode=True"),
        ("sparsify", {"d_in": None}, "must say 'd_in'"),
        ("dictionary_learning", {"trainer": {"dict_class": "GatedAutoEncoder"}}, "class 'GatedAutoEncoder'"),
        ("dictionary_learning", {"trainer": 3}, "object 'trainer'"),
        (
            "dictionary_learning",
            {"trainer": {"dict_class": "AutoEncoderTopK", "k": 9}},
            "k=9, but .* says k=5",
        ),
        ("dictionary_learning", {"trainer": {"dict_class": "BatchTopKSAE"}}, "before training set its threshold"),
        ("official", {"architecture": "gated"}, "architecture 'gated'"),
        ("safetensors", {"k": 6}, "k=6, but the weights file says k=5"),
    ],
)
def test_what_the_other_layouts_refuse(tmp_path: Path, layout: str, change: dict, message: str) -> None:
    save_sae(toy(), tmp_path / "s", layout)
    path = tmp_path / "s" / LAYOUTS[layout].config_name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=message):
        load_sae(tmp_path / "s")


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        ("official", {"d_sae": 65}),
        ("safetensors", {"d_model": 17}),
        ("sae_lens", {"d_in": 17}),
        ("sparsify", {"num_latents": 65}),
        ("dictionary_learning", {"trainer": {"dict_class": "AutoEncoderTopK", "dict_size": 65}}),
    ],
)
def test_sizes_that_contradict_the_config(tmp_path: Path, layout: str, change: dict) -> None:
    save_sae(toy(), tmp_path / "s", layout)
    path = tmp_path / "s" / LAYOUTS[layout].config_name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MismatchError, match="the config says d_"):
        load_sae(tmp_path / "s")


def test_batch_top_k_dictionaries_become_jumprelu(tmp_path: Path) -> None:
    sae, x = toy(), residuals()
    save_sae(sae, tmp_path / "s", "dictionary_learning")
    tensors = torch.load(tmp_path / "s" / "ae.pt", weights_only=True) | {"threshold": torch.tensor(4.0)}
    torch.save(tensors, tmp_path / "s" / "ae.pt")
    config = {"trainer": {"trainer_class": "BatchTopKTrainer", "layer": 3}}
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    back = load_sae(tmp_path / "s")
    pre = x @ sae.W_enc.T + sae.b_enc
    torch.testing.assert_close(back.encode(x).to_dense(), pre * (pre > 4), rtol=1e-5, atol=1e-5)
    assert (back.architecture, back.hook_point, back.k) == ("jumprelu", "layers.3.resid_post", None)


def test_what_sae_lens_said_about_its_training_is_kept(tmp_path: Path) -> None:
    said = {
        "sae_lens_version": "6.1.0",
        "context_size": 128,
        "dataset_path": "d",
        "hook_name": "blocks.3.hook_resid_post",
    }
    source = sae_lens_folder(tmp_path / "a", toy(), architecture="topk", k=5, metadata=said | {"model_name": "m"})
    save_sae(load_sae(source), tmp_path / "b", "sae_lens")
    config = json.loads((tmp_path / "b" / "cfg.json").read_text())
    assert config["apply_b_dec_to_input"] is False
    kept = {key: config["metadata"][key] for key in ("context_size", "dataset_path", "hook_name", "model_name")}
    assert kept == {
        "context_size": 128,
        "dataset_path": "d",
        "hook_name": "blocks.3.hook_resid_post",
        "model_name": "m",
    }


def test_sparsify_cannot_hold_a_threshold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only hold topk SAEs, not jumprelu"):
        save_sae(toy("jumprelu"), tmp_path / "s", "sparsify")
    assert not (tmp_path / "s").exists()


def test_two_layouts_in_one_folder_are_named(tmp_path: Path) -> None:
    save_sae(toy(), tmp_path / "a", "official")
    save_sae(toy(), tmp_path / "b", "safetensors")
    (tmp_path / "b" / "layer3.sae.safetensors").rename(tmp_path / "a" / "layer3.sae.safetensors")
    with pytest.raises(FormatError, match=r"official \(layer3.sae.pt\) and safetensors \(layer3.sae.safetensors\)"):
        load_sae(tmp_path / "a")
    assert load_sae(tmp_path / "a" / "layer3.sae.pt").identity.group == GROUP, "a file that is named is not ambiguous"


def test_a_config_that_is_missing_is_asked_for(tmp_path: Path) -> None:
    sae_lens_folder(tmp_path / "s", toy())
    (tmp_path / "s" / "cfg.json").unlink()
    with pytest.raises(FormatError, match=r"sae_weights.safetensors needs cfg.json beside it"):
        load_sae(tmp_path / "s")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="it holds nothing"):
        load_sae(tmp_path / "empty")

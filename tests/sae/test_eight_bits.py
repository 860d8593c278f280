"""SAEs stored in 8 bits: what is rounded, what they are afterwards, and files that are damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_toys import toy
from safetensors.torch import load_file, save_file

from qwen_scope.errors import FormatError, InputError, MismatchError
from qwen_scope.sae import SAE, compare_saes, fingerprint, load_sae, save_sae


def by_hand(matrix: torch.Tensor, over: int) -> torch.Tensor:
    """Each feature's numbers as whole multiples of a 127th of its largest, as bfloat16 has both."""
    scale = matrix.abs().amax(over, keepdim=True).bfloat16().float() / 127
    return ((matrix / scale).round() * scale).bfloat16()


@pytest.fixture
def stored(tmp_path: Path) -> tuple[SAE, Path]:
    sae = toy(layer=3)
    return sae, save_sae(sae, tmp_path / "eight", "safetensors", torch.int8)


def test_each_feature_is_rounded_to_127_steps(stored: tuple[SAE, Path]) -> None:
    sae, folder = stored
    again = load_sae(folder, 3)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.W_enc, by_hand(sae.W_enc, 1))
    assert torch.equal(again.W_dec, by_hand(sae.W_dec, 0))
    assert torch.equal(again.b_enc, sae.b_enc)
    assert torch.equal(again.b_dec, sae.b_dec)
    tensors = load_file(folder / "layer3.sae.safetensors")
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.int8} == {"W_enc", "W_dec"}
    assert compare_saes(sae, again).jaccard > 0.9


def test_it_is_another_sae_and_says_of_which(stored: tuple[SAE, Path]) -> None:
    sae, folder = stored
    again = load_sae(folder, 3)
    assert again.identity == replace(
        sae.identity, fingerprint=fingerprint(again.W_enc, again.W_dec, again.b_enc, again.b_dec)
    )
    assert again.identity.fingerprint != sae.identity.fingerprint
    assert again.meta["rounded"] == {sae.hook_point: sae.identity.fingerprint}
    assert str(again).endswith(f"rounded to 8 bits from {sae.identity.fingerprint[:12]}")
    with pytest.raises(MismatchError, match="already holds another SAE for layer 3"):
        save_sae(sae, folder, "safetensors")


def test_stored_again_it_stays_what_it_is(stored: tuple[SAE, Path], tmp_path: Path) -> None:
    _, folder = stored
    one = load_sae(folder, 3)
    save_sae(one, tmp_path / "again", "safetensors", torch.int8)
    save_sae(one, tmp_path / "bf16")
    for place in ("again", "bf16"):
        other = load_sae(tmp_path / place, 3)
        assert other.identity == one.identity
        assert other.meta["rounded"] == one.meta["rounded"]
        assert torch.equal(other.W_enc, one.W_enc)
        assert torch.equal(other.W_dec, one.W_dec)
    name = "layer3.sae.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_layers_of_one_folder_may_differ(stored: tuple[SAE, Path]) -> None:
    sae, folder = stored
    other = toy(layer=4)
    save_sae(other, folder, "safetensors")
    assert json.loads((folder / "config.json").read_text())["rounded"] == {sae.hook_point: sae.identity.fingerprint}
    assert "rounded" not in str(load_sae(folder, 4))
    assert load_sae(folder, 4).identity == other.identity


@pytest.mark.parametrize("factor", [0.0, 1e-38, 1e-30, 1e30])
def test_features_of_any_size(factor: float, tmp_path: Path) -> None:
    sae = toy(layer=0)
    W_enc = sae.W_enc.clone()
    W_enc[5] *= factor
    save_sae(replace(sae, W_enc=W_enc), tmp_path / "out", "safetensors", torch.int8)
    again = load_sae(tmp_path / "out", 0)
    assert again.W_enc.isfinite().all()
    expected = torch.zeros_like(W_enc[5]) if factor < 1e-30 else by_hand(W_enc[5:6], 1)[0].float()
    assert torch.equal(again.W_enc[5].float(), expected)


def test_any_architecture(tmp_path: Path) -> None:
    sae = toy("jumprelu", layer=1)
    save_sae(sae, tmp_path / "out", "safetensors", torch.int8)
    again = load_sae(tmp_path / "out", 1)
    assert again.architecture == "jumprelu"
    assert torch.equal(again.own_tensors()["threshold"], sae.own_tensors()["threshold"])


def test_refused(tmp_path: Path) -> None:
    for layout in ("official", "sae_lens", "sparsify", "dictionary_learning"):
        with pytest.raises(InputError, match="int8 are stored in the layout safetensors alone, not in"):
            save_sae(toy(layer=0), tmp_path / layout, layout, torch.int8)
    sae = toy(layer=0)
    with pytest.raises(InputError, match="W_dec is not finite"):
        save_sae(replace(sae, W_dec=torch.full_like(sae.W_dec, torch.nan)), tmp_path / "n", "safetensors", torch.int8)
    with pytest.raises(InputError, match=r"not torch\.int8"):
        load_sae("lab", 2, dtype=torch.int8)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("W_enc_scale", None, "lacks W_enc as an int8 matrix or its W_enc_scale"),
        ("W_dec_scale", lambda scale: scale[:-1], "W_dec_scale in .* one finite float32 number"),
        ("W_dec_scale", lambda scale: scale.half(), "W_dec_scale in .* one finite float32 number"),
        ("W_dec_scale", lambda scale: -scale, "W_dec_scale in .* of at least 0"),
        ("W_enc_scale", lambda scale: scale * torch.inf, "W_enc_scale in .* one finite float32 number"),
        ("W_enc", lambda matrix: matrix.float(), "lacks W_enc as an int8 matrix"),
        ("W_enc", lambda matrix: matrix.reshape(-1), "lacks W_enc as an int8 matrix"),
    ],
)  # fmt: skip
def test_damaged(stored: tuple[SAE, Path], name: str, damage, said: str) -> None:
    path = stored[1] / "layer3.sae.safetensors"
    tensors = load_file(path)
    changed = tensors.pop(name)
    if damage is not None:
        tensors[name] = damage(changed).contiguous()
    path.unlink()
    save_file(tensors, path)
    with pytest.raises(FormatError, match=said):
        load_sae(stored[1], 3)

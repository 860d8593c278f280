"""Weights and residuals that hold NaN or infinity: refused by name where they are first used."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_toys import residuals, toy
from safetensors.torch import load_file, save_file

from qwen_scope.errors import InputError, MismatchError, QwenScopeError
from qwen_scope.sae import LAYOUTS, SAE, catalog, fingerprint, load_sae, save_sae
from qwen_scope.sae.base import check_finite_weights
from qwen_scope.steer import Intervention

BAD = (math.nan, math.inf, -math.inf)


def broken(name: str, bad: float, kind: str = "topk") -> SAE:
    sae = toy(kind)
    tensor = getattr(sae, name).clone()
    tensor[3, 5] = bad
    return replace(sae, **{name: tensor})


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("bad", BAD)
def test_an_encoder_is_looked_through_before_it_answers(kind: str, bad: float) -> None:
    x = residuals()
    x[:, 5] = -math.copysign(1, bad)  # an infinite weight that ReLU would hide
    with pytest.raises(InputError, match=r"W_enc is not finite: it holds NaN or infinity, first at \[3, 5\]"):
        broken("W_enc", bad, kind).encode(x)
    with pytest.raises(InputError, match="W_enc is not finite"):
        broken("W_enc", bad, kind).pre_acts(x)


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("bad", BAD)
def test_a_decoder_is_looked_through_before_it_reconstructs(kind: str, bad: float) -> None:
    sae = broken("W_dec", bad, kind)
    with pytest.raises(InputError, match=r"W_dec is not finite: it holds NaN or infinity, first at \[3, 5\]"):
        sae.decode(sae.encode(residuals()))


@pytest.mark.parametrize("bad", BAD)
def test_a_column_is_looked_at_before_it_steers(bad: float) -> None:
    one = Intervention.add(layer=3, feature=5, amount=1.0)
    with pytest.raises(InputError, match=r"W_dec\[:, 5\] holds NaN or infinity"):
        one.apply(residuals(), broken("W_dec", bad))
    other = Intervention.add(layer=3, feature=6, amount=1.0)
    assert other.apply(residuals(), broken("W_dec", bad)).isfinite().all()


def test_a_decoder_column_of_zeros_can_not_steer() -> None:
    sae = toy()
    sae.W_dec[:, 9] = 0
    for one in (Intervention.add(layer=3, feature=9, amount=1.0), Intervention.clamp(layer=3, feature=9, amount=1.0)):
        with pytest.raises(InputError, match="writes nothing: its decoder is zero"):
            one.apply(residuals(), sae)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
def test_what_is_not_finite_is_not_stored(tmp_path: Path, layout: str, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is not finite"):
        save_sae(broken(name, math.inf), tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_weights_that_overflow_the_type_they_are_stored_in(tmp_path: Path) -> None:
    sae = toy()
    sae.W_dec[0, 0] = 1e5
    with pytest.raises(InputError, match=r"W_dec is not finite.*above 65504 do not fit float16"):
        save_sae(sae, tmp_path, "official", torch.float16)
    save_sae(sae, tmp_path, "official", torch.bfloat16)


@pytest.mark.parametrize("layout", ["safetensors", "sae_lens", "sparsify"])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_every_tensor_of_a_file_is_named(tmp_path: Path, layout: str, name: str) -> None:
    save_sae(toy(), tmp_path, layout)
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    stored = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}.get(name, name) if layout == "sparsify" else name
    tensors[stored].flatten()[1] = math.inf
    save_file(tensors, file)

    def use() -> None:
        sae = load_sae(tmp_path)
        sae.decode(sae.encode(residuals()))

    with pytest.raises(QwenScopeError, match=f"{name} .*NaN or infinity"):
        use()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_residual_that_is_not_finite_says_where_and_what_to_do(bad: float) -> None:
    x = residuals().abs()
    x[2] = bad
    sae = replace(toy(), W_enc=toy().W_enc.abs())
    with pytest.raises(InputError, match=r"row 2 .* at layers\.3\.resid_post: .* bfloat16 or float32"):
        sae.encode(x)


def test_sums_that_overflow_are_no_alarm() -> None:
    check_finite_weights("W_enc", torch.full((4, 8), 3e38))
    check_finite_weights("W_enc", torch.full((4, 8), 6e4, dtype=torch.float16).T)
    check_finite_weights("W_enc", torch.cat([torch.full((4, 8), 3e38), torch.full((4, 8), -3e38)]))


@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (70, 3)])
def test_one_bad_number_anywhere_is_found(shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for i in range(0, shape[0] * shape[1], 7):
            tensor = torch.zeros(shape, dtype=dtype)
            tensor.view(-1)[i] = -math.inf
            for turned in (tensor, tensor.T, tensor[:, ::2]):
                if not turned.isfinite().all():
                    with pytest.raises(InputError, match="W_dec is not finite"):
                        check_finite_weights("W_dec", turned)


@pytest.mark.parametrize("layout", ["sae_lens", "sparsify", "dictionary_learning"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tools_that_compute_in_the_stored_type_get_float32(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    sae = toy().to(dtype=dtype)
    save_sae(sae, tmp_path / "default", layout)
    back = load_sae(tmp_path / "default")
    assert back.dtype == torch.float32
    assert torch.equal(back.W_enc, sae.W_enc.float())
    if layout == "sae_lens":
        assert json.loads((tmp_path / "default" / "cfg.json").read_text())["dtype"] == "float32"
    save_sae(sae, tmp_path / "asked", layout, dtype)
    assert load_sae(tmp_path / "asked").dtype == dtype


@pytest.mark.parametrize("layout", ["official", "safetensors"])
def test_our_own_layouts_keep_the_type(tmp_path: Path, layout: str) -> None:
    save_sae(toy().to(dtype=torch.bfloat16), tmp_path, layout)
    assert load_sae(tmp_path).dtype == torch.bfloat16


def test_fingerprints_of_both_kinds_are_those_of_what_is_stored(tmp_path: Path) -> None:
    for kind in ("topk", "jumprelu"):
        sae = replace(toy(kind), identity=replace(toy().identity, fingerprint=""))
        save_sae(sae, tmp_path / kind)
        back = load_sae(tmp_path / kind)
        tensors = {n: getattr(back, n) for n in ("W_enc", "W_dec", "b_enc", "b_dec")}
        assert set(back.own_tensors()) == ({"threshold"} if kind == "jumprelu" else set())
        assert back.identity.fingerprint == fingerprint(**tensors, **back.own_tensors())


@pytest.mark.parametrize("k", [0, -1, 65, 10**9])
def test_a_k_that_can_not_be_is_refused(tmp_path: Path, k: int) -> None:
    save_sae(toy(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"k": k}))
    with pytest.raises(QwenScopeError, match="k"):
        load_sae(tmp_path)


def test_a_group_of_the_catalog_has_the_catalogs_k(tmp_path: Path) -> None:
    save_sae(toy(), tmp_path)
    listed = catalog.Group(
        name="SAE-Res-Toy-W1K-L0_5", repo=None, folder=tmp_path, model="toy", kind="base", layers=1, d_model=16,
        d_sae=64, k=5,
    )  # fmt: skip
    assert load_sae(listed).k == 5
    with pytest.raises(MismatchError, match="k=7 according to the catalog, but layer 3 says k=5"):
        load_sae(replace(listed, k=7))

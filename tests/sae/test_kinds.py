"""What every architecture must do; each is found in the registry, so a new one is tested by existing."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_toys import residuals

from qwen_scope.errors import FormatError, InputError, MismatchError
from qwen_scope.sae import KINDS, LAYOUTS, SAE, Identity, fingerprint, load_sae, save_sae

D_MODEL, D_SAE, K = 16, 64, 4
MATRICES = ("W_enc", "W_dec", "b_enc", "b_dec")
EVERY = pytest.mark.parametrize("name", KINDS)


def made(name: str, layer: int = 3) -> SAE:
    """An SAE of the kind with random weights; its own vectors are positive, as thresholds and gains are."""
    kind: Any = KINDS[name]
    g = torch.Generator().manual_seed(layer)
    tensors = {
        "W_enc": torch.randn(D_SAE, D_MODEL, generator=g),
        "W_dec": torch.randn(D_MODEL, D_SAE, generator=g),
        "b_enc": torch.randn(D_SAE, generator=g),
        "b_dec": torch.randn(D_MODEL, generator=g),
        **{own: torch.rand(D_SAE, generator=g) + 0.5 for own in kind.own},
    }
    identity = Identity("SAE-Res-Toy-L0_4", layer, fingerprint(**tensors))
    given = {"k": K} if kind.fixed_k else {}
    return kind(**tensors, **given, hook_point=f"layers.{layer}.resid_post", identity=identity)


@EVERY
def test_it_says_what_it_is_and_never_changes(name: str) -> None:
    sae = made(name)
    assert sae.architecture == name
    assert sae.k == (K if sae.fixed_k else None)
    assert (sae.d_sae, sae.d_model) == (D_SAE, D_MODEL)
    with pytest.raises(FrozenInstanceError):
        sae.b_dec = torch.zeros(D_MODEL)
    tensors = [getattr(sae, tensor) for tensor in (*MATRICES, *sae.own)]
    assert sae.nbytes == sum(4 * tensor.numel() for tensor in tensors)
    sae.encode(residuals())
    assert sae.nbytes == sum(4 * tensor.numel() for tensor in tensors) + sae.cached_bytes
    assert name in repr(sae)


@EVERY
def test_pre_activations_are_the_formula_and_have_a_gradient(name: str) -> None:
    sae, x = made(name), residuals().requires_grad_()
    pre = sae.pre_acts(x)
    expected = x.double() @ sae.W_enc.double().T + sae.b_enc.double()
    torch.testing.assert_close(pre.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sae.pre_acts(x, [5, 63, 0]), pre[:, [5, 63, 0]], rtol=1e-5, atol=1e-4)
    (slope,) = torch.autograd.grad(sae.pre_acts(x, [5]).sum(), x)
    torch.testing.assert_close(slope, sae.W_enc[5].expand_as(x))


@EVERY
def test_activations_are_in_order_and_decode_to_their_sum(name: str) -> None:
    sae, x = made(name), residuals()
    acts = sae.encode(x)
    assert acts.width == D_SAE
    assert acts.active().double().mean() > 0
    assert (acts.values >= 0).all()
    assert (acts.values[:, 1:] <= acts.values[:, :-1]).all(), "slots stand in descending value"
    assert (acts.indices[acts.values == 0] == 0).all(), "an unused slot has index 0"
    for row in range(len(x)):
        used = acts.indices[row][acts.values[row] > 0].tolist()
        assert len(used) == len(set(used)), "a feature stands in one slot"
    if sae.fixed_k:
        assert acts.k == K
    expected = acts.to_dense().double() @ sae.W_dec.double().T + sae.b_dec.double()
    torch.testing.assert_close(sae.decode(acts).double(), expected, rtol=1e-5, atol=1e-5)
    # A row's features do not depend on the rows beside it, nor on the shape they come in.
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(sae.encode(x[7]).to_dense(), acts[7].to_dense(), **close)
    torch.testing.assert_close(sae.encode(x.view(3, 11, -1)).to_dense(), acts.to_dense().view(3, 11, -1), **close)


@EVERY
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_comes_back_from_every_layout_that_can_hold_it(name: str, layout: str, tmp_path: Path) -> None:
    sae, kinds = made(name), LAYOUTS[layout].kinds
    if kinds is not None and name not in kinds:
        with pytest.raises(InputError, match=f"the {layout} layout can only hold .* SAEs, not {name}"):
            save_sae(sae, tmp_path / "out", layout)
        assert not (tmp_path / "out").exists()
        return
    save_sae(sae, tmp_path / "out", layout)
    back = load_sae(tmp_path / "out")
    assert type(back) is type(sae)
    assert (back.identity, back.hook_point, back.k) == (sae.identity, sae.hook_point, sae.k)
    for own in sae.own:
        assert torch.equal(getattr(back, own), getattr(sae, own))
    both = [one.encode(residuals()).to_dense() for one in (back, sae)]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-4)


@EVERY
def test_a_copy_of_another_type_is_the_same_sae(name: str) -> None:
    sae = made(name)
    half = sae.to(dtype=torch.bfloat16)
    assert half.identity == sae.identity
    assert half.dtype == torch.bfloat16
    assert {getattr(half, vector).dtype for vector in ("b_enc", "b_dec", *sae.own)} == {torch.float32}


@EVERY
def test_its_own_tensors_are_part_of_its_fingerprint_and_are_checked(name: str, tmp_path: Path) -> None:
    sae: Any = made(name)
    tensors = {tensor: getattr(sae, tensor) for tensor in MATRICES}
    for own in sae.own:
        changed = sae.own_tensors() | {own: getattr(sae, own) + 1}
        assert fingerprint(**tensors, **changed) != sae.identity.fingerprint
        broken = replace(sae, **{own: torch.full((D_SAE,), torch.nan)})
        save_sae(broken, tmp_path / own)
        with pytest.raises(FormatError, match=f"{own} holds NaN or infinity"):
            load_sae(tmp_path / own)


@EVERY
def test_wrong_shapes_and_numbers_that_are_none_are_refused(name: str) -> None:
    sae: Any = made(name)
    with pytest.raises(MismatchError):
        sae.encode(torch.zeros(2, D_MODEL + 1))
    with pytest.raises(InputError, match="not finite"):
        sae.encode(torch.full((2, D_MODEL), torch.nan))
    with pytest.raises(MismatchError):
        sae.decode(replace(sae.encode(residuals()), width=D_SAE + 1))
    with pytest.raises(InputError, match="feature 64 does not exist"):
        sae.pre_acts(residuals(), [64])
    with pytest.raises(MismatchError):
        replace(sae, b_enc=torch.zeros(D_SAE + 1))


def test_a_kind_nobody_knows_is_refused_with_those_that_are(tmp_path: Path) -> None:
    save_sae(made("topk"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"topk"', '"gated"'))
    with pytest.raises(FormatError, match=f"architecture 'gated' can't be read; {' and '.join(KINDS)} can"):
        load_sae(tmp_path)

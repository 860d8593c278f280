"""The sparse products against autograd of the dense formula, in float64."""

from __future__ import annotations

import pytest
import torch

from qwen_scope.sae import kernels
from qwen_scope.sae.kernels import dispatch, screened
from qwen_scope.train import selection
from qwen_scope.train import sparse as train_sparse
from qwen_scope.train.selection import largest, top_entries
from qwen_scope.train.sparse import Active, Decode, Encode, sampled, sampled_in_parts, weighted_features


def setting(n: int = 13, d_model: int = 6, d_sae: int = 20, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "x": draw(n, d_model), "W_enc": draw(d_sae, d_model), "W_dec": draw(d_sae, d_model), "b_enc": draw(d_sae),
        "b_dec": draw(d_model), "target": draw(n, d_model),
    }  # fmt: skip


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("ragged", [True, False])
def test_gradients_equal_autograd_of_the_dense_formula(pre_bias: bool, ragged: bool) -> None:
    k = 4
    dense = {name: t.clone().requires_grad_(name not in ("x", "target")) for name, t in setting().items()}
    seen = dense["x"] - dense["b_dec"] if pre_bias else dense["x"]
    pre = seen @ dense["W_enc"].T + dense["b_enc"]
    if ragged:
        mask = pre.detach() > 1.5
        mask[2] = False
    else:
        mask = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, pre.topk(k).indices, True)
    ((torch.where(mask, pre, 0) @ dense["W_dec"] + dense["b_dec"] - dense["target"]) ** 2).sum().backward()

    sparse = {name: t.clone().requires_grad_(name not in ("x", "target")) for name, t in setting().items()}
    rows, features = mask.nonzero(as_tuple=True)
    active = Active.of_entries(rows, features, len(mask), mask.shape[1])
    acts = Encode.apply(
        pre.detach()[mask], active, sparse["x"], sparse["W_enc"], sparse["b_enc"], sparse["b_dec"] if pre_bias else None
    )
    x_hat = Decode.apply(acts, active, sparse["W_dec"]) + sparse["b_dec"]
    ((x_hat - sparse["target"]) ** 2).sum().backward()
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(sparse[name].grad, dense[name].grad, rtol=1e-12, atol=1e-12)


def test_no_entry_at_all() -> None:
    s = setting()
    active = Active.of_entries(torch.zeros(0), torch.zeros(0), 13, 20)
    none = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    x_hat = Decode.apply(none, active, s["W_dec"].requires_grad_())
    assert x_hat.shape == (13, 6)
    assert not x_hat.any()
    x_hat.sum().backward()
    assert not s["W_dec"].grad.any()


def test_sampled_is_the_product_at_the_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    s = setting()
    active = Active.of_slots(torch.tensor([[0, 3], [19, 2], *[[5, 6]] * 11]), 20)
    expected = (s["target"] @ s["W_dec"].T)[active.row_of.long(), active.features.long()]
    torch.testing.assert_close(sampled(s["target"], active, s["W_dec"]), expected)
    torch.testing.assert_close(sampled_in_parts(s["target"], active, s["W_dec"]), expected)
    assert len(active.features) % 4
    monkeypatch.setattr(train_sparse, "PART_NUMBERS", 4 * 6)  # several parts, the last one shorter
    torch.testing.assert_close(sampled_in_parts(s["target"], active, s["W_dec"]), expected)


def test_transposed_product() -> None:
    s = setting()
    active = Active.of_slots(torch.tensor([[0, 3], [19, 2], *[[5, 6]] * 11]), 20)
    values = torch.arange(26, dtype=torch.float64)
    A = torch.zeros(13, 20, dtype=torch.float64)
    A[active.row_of.long(), active.features.long()] = values
    torch.testing.assert_close(weighted_features(values, active, s["x"]), A.T @ s["x"])


@pytest.mark.parametrize(("width", "k"), [(64, 3), (2048, 32), (100, 7), (16, 16), (64, 4), (8, 1)])
def test_the_k_largest_by_way_of_groups(width: int, k: int) -> None:
    pre = torch.randn(50, width, generator=torch.Generator().manual_seed(width))
    pre[0] = 1.0
    values, features = largest(pre, k)
    assert torch.equal(values.sort(-1, descending=True).values, pre.sort(-1, descending=True).values[:, :k])
    assert torch.equal(pre.gather(1, features), values)
    assert all(len(row.unique()) == k for row in features)


def test_tiles_do_not_change_the_choice() -> None:
    s = setting(n=33)
    whole = top_entries(s["x"], s["W_enc"], s["b_enc"], 5)
    tiled = top_entries(s["x"], s["W_enc"], s["b_enc"], 5, tile_bytes=8 * 20 * 4)
    torch.testing.assert_close(whole[0].sort().values, tiled[0].sort().values)
    assert torch.equal(whole[1].sort().values, tiled[1].sort().values)


@pytest.mark.skipif(not screened.cpu_multiplies_bf16(), reason="this CPU has no bf16 instructions")
def test_screening_in_bf16_chooses_what_fp32_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers, where every order of adding up gives the same; rows with fewer than k above zero among them."""
    monkeypatch.setattr(dispatch, "FEWEST_WEIGHTS", 1)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (selection.SCREEN_ROWS, 24), generator=g).float()
    x[5] = 0
    W = torch.randint(-3, 4, (1024, 24), generator=g).float().requires_grad_()
    b = torch.randint(-40, 0, (1024,), generator=g).float()
    b[:4] = 3
    assert kernels.worth_screening(x, W, b)
    values, features = top_entries(x, W, b, 9)
    truth = kernels.encode_topk_reference(x, W.detach(), b, 9)
    assert (truth.active() < 9).any()
    assert torch.equal(values, truth.values)
    assert torch.equal(features, truth.indices)
    assert not values.requires_grad
    x[3, 1] = torch.nan
    assert top_entries(x, W, b, 9)[0][3].isnan().any()

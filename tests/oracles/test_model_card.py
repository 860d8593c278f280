"""The snippet of the released SAEs' model card, restated, against this package at the true size of Qwen3-1.7B."""

from __future__ import annotations

import pytest
import torch

from qwen_scope.sae import TopK

D_SAE, D_MODEL, ROWS = 32_768, 2_048, 48


def card(x: torch.Tensor, sae: TopK) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pre-activations, and the k largest of them, as the card takes them: no ReLU."""
    pre = x @ sae.W_enc.T + sae.b_enc
    values, indices = pre.topk(sae.k, dim=-1)
    return pre, values, indices


@pytest.fixture(scope="module")
def weights() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    W_enc = torch.randn(D_SAE, D_MODEL, generator=g) / D_MODEL**0.5
    W_dec = torch.randn(D_MODEL, D_SAE, generator=g) / D_MODEL**0.5
    return W_enc, W_dec, torch.randn(D_SAE, generator=g) * 0.1, torch.randn(D_MODEL, generator=g)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(ROWS, D_MODEL, generator=torch.Generator().manual_seed(1)) * 5


@pytest.mark.slow
@pytest.mark.parametrize("k", [50, 100])
def test_the_same_features_and_values_as_the_card(weights: tuple, x: torch.Tensor, k: int) -> None:
    sae = TopK(*weights, k=k)
    acts = sae.encode(x)
    pre, values, indices = card(x, sae)
    assert (values > 0).all(), "with at least k positive pre-activations the two orders of ReLU and top-k agree"
    mine = torch.zeros_like(pre).scatter_(-1, acts.indices.long(), acts.values)
    theirs = torch.zeros_like(pre).scatter_(-1, indices, values)
    # Both are fp32 sums of 2,048 products; which library adds them, and in which order, depends on the CPU.
    torch.testing.assert_close(mine, theirs.where(mine > 0, 0), rtol=1e-5, atol=1e-5)
    # A feature in one set only must tie with the k-th largest within the rounding of an fp32 sum, seen in float64.
    for row, feature in ((mine > 0) != (theirs > 0)).nonzero().tolist():
        exact = x[row].double() @ sae.W_enc.T.double() + sae.b_enc.double()
        assert abs(exact[feature] - exact.topk(k).values[-1]) < 1e-4
    dense = theirs.double() @ sae.W_dec.T.double() + sae.b_dec.double()
    if ((mine > 0) == (theirs > 0)).all():
        torch.testing.assert_close(sae.decode(acts).double(), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_copy_in_bf16_is_computed_in_fp32(weights: tuple, x: torch.Tensor) -> None:
    copy = TopK(*weights, k=50).to(dtype=torch.bfloat16)
    pre = x @ copy.W_enc.float().T + copy.b_enc
    values = copy.encode(x).values
    torch.testing.assert_close(values, pre.topk(50, dim=-1).values, rtol=1e-5, atol=1e-5)


def test_with_fewer_positive_ones_the_card_keeps_negative_values_and_this_package_does_not() -> None:
    sae = TopK(torch.eye(4), torch.eye(4), torch.tensor([1.0, -1.0, 2.0, -5.0]), torch.zeros(4), k=3)
    _, values, indices = card(torch.zeros(1, 4), sae)
    assert indices.tolist() == [[2, 0, 1]]
    assert values.tolist() == [[2.0, 1.0, -1.0]]
    assert sae.encode(torch.zeros(1, 4)).to_dense().tolist() == [[1.0, 0.0, 2.0, 0.0]]


def test_among_equal_values_the_lower_feature_is_kept() -> None:
    """The card leaves the choice to `topk`, which promises nothing; here it does not depend on the device."""
    sae = TopK(torch.ones(6, 2), torch.ones(2, 6), torch.zeros(6), torch.zeros(2), k=2)
    assert sae.encode(torch.ones(3, 2)).indices.tolist() == [[0, 1]] * 3

"""Every fast path equals its reference, whatever the shape, the stored type and the size of a tile."""

from __future__ import annotations

import pytest
import torch

from qwen_scope.errors import InputError
from qwen_scope.sae import FeatureActs, JumpReLU, TopK, kernels

SHAPES = [(1, 8, 16, 3), (7, 16, 64, 5), (33, 5, 100, 100), (4, 3, 2, 1), (0, 8, 16, 3)]  # rows, d_model, d_sae, k
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILES = [4, 300, 4096, 2**26]


def weights(d_model: int, d_sae: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Whole numbers, so that every path adds up exactly and equal pre-activations are common."""
    g = torch.Generator().manual_seed(d_sae)
    return (
        torch.randint(-3, 4, (d_sae, d_model), generator=g).to(dtype),
        torch.randint(-3, 4, (d_model, d_sae), generator=g).to(dtype),
        torch.randint(-9, 10, (d_sae,), generator=g).float(),
        torch.randint(-9, 10, (d_model,), generator=g).float(),
    )


def rows(n: int, d_model: int) -> torch.Tensor:
    return torch.randint(-3, 4, (n, d_model), generator=torch.Generator().manual_seed(n)).float()


def same(a: FeatureActs, b: FeatureActs) -> bool:
    return a.width == b.width and torch.equal(a.indices, b.indices) and torch.equal(a.values, b.values)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d_model", "d_sae", "k"), SHAPES)
def test_tiles_change_nothing(n: int, d_model: int, d_sae: int, k: int, dtype: torch.dtype, tile: int) -> None:
    W_enc, W_dec, b_enc, b_dec = weights(d_model, d_sae, dtype)
    x = rows(n, d_model)
    top = kernels.encode_topk(x, W_enc, b_enc, k, tile)
    assert same(top, kernels.encode_topk_reference(x, W_enc, b_enc, k))
    threshold = torch.arange(d_sae).float() % 12 - 2
    jump = kernels.encode_threshold(x, W_enc, b_enc, threshold, tile)
    assert same(jump, kernels.encode_threshold_reference(x, W_enc, b_enc, threshold))
    for acts in (top, jump):
        assert torch.equal(kernels.decode(acts, W_dec, b_dec, tile), kernels.decode_reference(acts, W_dec, b_dec))


def test_equal_rows_and_all_features_equal() -> None:
    W_enc, b_enc = torch.ones(50, 4), torch.zeros(50)
    acts = kernels.encode_topk(torch.ones(3, 4), W_enc, b_enc, 7)
    assert acts.indices.tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 3
    acts = kernels.encode_topk(torch.ones(3, 4), W_enc.bfloat16(), b_enc, 7, tile_bytes=64)
    assert acts.indices.tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 3


def test_fewer_than_k_positive_leaves_slots_unused() -> None:
    W_enc, b_enc = torch.eye(4), torch.tensor([1.0, -1.0, 2.0, -5.0])
    acts = kernels.encode_topk(torch.zeros(1, 4), W_enc, b_enc, 3)
    assert acts.indices.tolist() == [[2, 0, 0]]
    assert acts.values.tolist() == [[2.0, 1.0, 0.0]]


@pytest.mark.parametrize("shape", [(2, 3, 8), (0, 8), (2, 0, 8), (8,)])
def test_any_number_of_row_dimensions(shape: tuple[int, ...]) -> None:
    W_enc, W_dec, b_enc, b_dec = weights(8, 32, torch.float32)
    x = torch.ones(shape)
    for sae in (TopK(W_enc, W_dec, b_enc, b_dec, k=3), JumpReLU(W_enc, W_dec, b_enc, b_dec, threshold=b_enc.abs())):
        acts = sae.encode(x)
        assert acts.shape == x.shape[:-1]
        assert sae.decode(acts).shape == x.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_found(bad: float) -> None:
    W_enc, W_dec, b_enc, b_dec = weights(8, 32, torch.float32)
    x = torch.ones(3, 8)
    x[1, 2] = bad
    for sae in (TopK(W_enc, W_dec, b_enc, b_dec, k=3), JumpReLU(W_enc, W_dec, b_enc, b_dec, threshold=b_enc.abs())):
        with pytest.raises(InputError, match="row 1 has pre-activations that are not finite"):
            sae.encode(x)
        holed = W_enc.clone()
        holed[31, 0] = float("nan")
        broken = type(sae)(holed, W_dec, b_enc, b_dec, sae.k if isinstance(sae, TopK) else sae.threshold)
        with pytest.raises(InputError, match="not finite"):
            broken.encode(torch.ones(3, 8))


def test_gradients_reach_the_residual_and_the_values() -> None:
    W_enc, W_dec, b_enc, b_dec = weights(8, 32, torch.float32)
    sae = TopK(W_enc, W_dec, b_enc, b_dec, k=3)
    x = torch.ones(2, 8, requires_grad=True)
    sae.pre_acts(x, [4, 9])[:, 1].sum().backward()
    assert torch.equal(x.grad, W_enc[9].expand(2, 8))
    acts = sae.encode(x)
    assert not acts.values.requires_grad
    values = acts.values.clone().requires_grad_()
    sae.decode(FeatureActs(acts.indices, values, acts.width)).sum().backward()
    assert torch.equal(values.grad, W_dec.sum(0)[acts.indices.long()])

"""Every fast path equals its reference, whatever the shape, the stored type and the size of a tile."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_scope.errors import InputError
from qwen_scope.sae import FeatureActs, JumpReLU, TopK, kernels
from qwen_scope.sae.kernels import product

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


def test_a_decoder_feature_by_feature_is_the_same_sae_and_is_not_turned_over(monkeypatch: pytest.MonkeyPatch) -> None:
    W_enc, W_dec, b_enc, b_dec = weights(8, 32, torch.float32)
    x = rows(40, 8)
    for sae in (TopK(W_enc, W_dec, b_enc, b_dec, k=3), JumpReLU(W_enc, W_dec, b_enc, b_dec, threshold=b_enc.abs())):
        turned = sae.by_feature()
        assert (turned.identity, turned.nbytes) == (sae.identity, sae.nbytes)
        assert torch.equal(turned.W_dec, W_dec)
        assert turned.W_dec[:, 5].is_contiguous()
        acts = sae.encode(x)
        truth = (acts.to_dense() @ W_dec.T + b_dec).sum(), W_dec.sum(0)[acts.indices.long()]
        values = acts.values.clone().requires_grad_()
        with monkeypatch.context() as only:
            # A table would be filled by copying.
            only.setattr(torch.Tensor, "copy_", lambda *_: pytest.fail("the decoder was turned over"))
            out = turned.decode(FeatureActs(acts.indices, values, acts.width)).sum()
            out.backward()
        torch.testing.assert_close((out.detach(), values.grad), truth)


def decoded_and_gradient(decode, acts: FeatureActs, W_dec: torch.Tensor, b_dec: torch.Tensor, *tile: int):
    values = acts.values.clone().requires_grad_()
    out = decode(FeatureActs(acts.indices, values, acts.width), W_dec, b_dec, *tile)
    wanted = torch.arange(out.numel()).reshape(out.shape) % 7 - 3.0
    (gradient,) = torch.autograd.grad((out * wanted).sum(), values)
    return out.detach(), gradient


@pytest.mark.parametrize("feature_by_feature", [False, True])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d_model", "d_sae", "k"), [(40, 50, 64, 5), (300, 16, 100, 1), (3, 20, 900, 4)])
def test_decode_and_its_gradient(
    n: int, d_model: int, d_sae: int, k: int, dtype: torch.dtype, tile: int, feature_by_feature: bool
) -> None:
    W_enc, W_dec, b_enc, b_dec = weights(d_model, d_sae, dtype)
    W_dec = W_dec.T.contiguous().T if feature_by_feature else W_dec
    acts = kernels.encode_topk_reference(rows(n, d_model), W_enc, b_enc, k)
    mine = decoded_and_gradient(kernels.decode, acts, W_dec, b_dec, tile)
    truth = decoded_and_gradient(kernels.decode_reference, acts, W_dec, b_dec)
    assert all(torch.equal(a, b) for a, b in zip(mine, truth, strict=True))


def test_decode_differentiates_in_a_decoder_that_learns() -> None:
    W_enc, W_dec, b_enc, b_dec = weights(8, 32, torch.float32)
    acts = kernels.encode_topk_reference(rows(40, 8), W_enc, b_enc, 3)
    grads = []
    for decode in (kernels.decode, kernels.decode_reference):
        learning, bias = W_dec.clone().requires_grad_(), b_dec.clone().requires_grad_()
        grads.append(torch.autograd.grad(decode(acts, learning, bias).sum(), (learning, bias)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Largest(TorchDispatchMode):
    """The most numbers any tensor made inside the block has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else (out,)
        self.numbers = max([self.numbers, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("feature_by_feature", [False, True])
def test_decode_and_its_gradient_make_nothing_dense(feature_by_feature: bool) -> None:
    n, d_model, d_sae, k = 600, 64, 2000, 40
    W_dec = torch.randn(d_model, d_sae)
    W_dec = W_dec.T.contiguous().T if feature_by_feature else W_dec
    acts = FeatureActs(torch.randint(0, d_sae, (n, k)).int(), torch.rand(n, k), d_sae)
    weights_are = d_model * d_sae
    assert n * k * d_model > 4 * weights_are
    assert n * d_sae > 4 * weights_are
    with Largest() as seen:
        decoded_and_gradient(kernels.decode, acts, W_dec, torch.zeros(d_model))
    assert seen.numbers <= weights_are


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("n", [0, 1, 16, 33])
def test_the_fp32_product_is_the_same_by_either_library(monkeypatch: pytest.MonkeyPatch, n: int, slow: bool) -> None:
    monkeypatch.setattr(product, "mkl_is_slow", lambda: slow and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    W, _, b, _ = weights(50, 64, torch.float32)
    x = rows(n, 50)
    assert torch.equal(kernels.linear_fp32(x, W, b), torch.nn.functional.linear(x, W, b))
    assert torch.equal(kernels.linear_fp32(x.double(), W.double(), b.double()).float(), kernels.linear_fp32(x, W, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 5])
def test_weights_of_a_smaller_type_are_widened_in_pieces(
    monkeypatch: pytest.MonkeyPatch, n: int, dtype: torch.dtype
) -> None:
    """More at once does not stay in the cache, and one row took ten times as long."""
    widened, d_model, d_sae = [], 50, 64
    whole = kernels.linear_fp32
    monkeypatch.setattr(product, "WIDENED_BYTES", 10 * 4 * d_model)
    monkeypatch.setattr(product, "linear_fp32", lambda x, W, b: widened.append(len(W)) or whole(x, W, b))
    W_enc, _, b_enc, _ = weights(d_model, d_sae, dtype)
    x, threshold = rows(n, d_model), torch.zeros(d_sae)
    assert same(kernels.encode_topk(x, W_enc, b_enc, 7), kernels.encode_topk_reference(x, W_enc, b_enc, 7))
    jump = kernels.encode_threshold(x, W_enc, b_enc, threshold)
    assert same(jump, kernels.encode_threshold_reference(x, W_enc, b_enc, threshold))
    assert widened == [10, 10, 10, 10, 10, 10, 4] * 2

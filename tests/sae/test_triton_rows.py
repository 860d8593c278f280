"""The Triton rows equal their references: on a GPU where there is one, else in Triton's interpreter (see conftest)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the extra `gpu` is not installed")

from test_screening import CASES, check_against_float64, quantised, randn

from qwen_scope.sae import FeatureActs, kernels
from qwen_scope.sae.kernels import bound
from qwen_scope.sae.kernels import triton as triton_path

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def encode(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int, tile: int | None = None):
    x, W, b = x.to(DEVICE), W.to(DEVICE), b.to(DEVICE)
    acts, stats = kernels.encode_topk_screened(x, W, b, k, kernels.prepare(W, b), tile, use_triton=True)
    assert stats.path == "screened+triton"
    return acts.to("cpu"), stats


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_answer_is_the_fp32_one(case) -> None:
    x, W, b = case()
    acts, stats = encode(x[:8], W, b, 7)
    check_against_float64(acts, x[:8], W, b, 7)
    assert stats.rows == 8


@pytest.mark.parametrize("tile", [1, None])
def test_where_fp32_is_exact_nothing_differs(tile: int | None) -> None:
    x, W, b = quantised()
    acts, stats = encode(x[:4], W, b, 30, tile)
    truth = kernels.encode_topk_reference(x[:4], W, b, 30)
    assert torch.equal(acts.indices, truth.indices)
    assert torch.equal(acts.values, truth.values)
    assert stats.fallback < 4


def test_bf16_weights_and_rows_that_are_not_covered() -> None:
    x, W, b = randn(5, 50), randn(2013, 50, seed=1).bfloat16(), randn(2013, seed=2)
    x[3, 2] = 3e38
    acts, stats = encode(x, W, b, 7)
    assert stats.fallback == 1
    others = [0, 1, 2, 4]
    check_against_float64(acts[torch.tensor(others)], x[others], W, b, 7)


def test_no_rows() -> None:
    acts, _ = encode(randn(0, 64), randn(2048, 64, seed=1), randn(2048), 5)
    assert acts.shape == (0,)


def test_few_candidates_where_rows_are_ordinary() -> None:
    x, W, b = randn(6, 256), randn(4096, 256, seed=1), randn(4096, seed=2)
    _, stats = encode(x, W, b, 20)
    assert stats.fallback == 0
    assert 20 * 6 <= stats.candidates < 6 * 20 * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d_model", "d_sae", "k"), [(5, 50, 64, 5), (9, 16, 40, 1), (3, 200, 17, 17)])
def test_decode_and_its_gradient(n: int, d_model: int, d_sae: int, k: int, dtype: torch.dtype) -> None:
    """Whole numbers, so that every order of adding up gives the same."""
    g = torch.Generator().manual_seed(0)
    W_dec = torch.randint(-3, 4, (d_model, d_sae), generator=g).to(DEVICE, dtype)
    b_dec = torch.randint(-3, 4, (d_model,), generator=g).to(DEVICE, torch.float32)
    indices = torch.randint(0, d_sae, (n, k), generator=g).int().to(DEVICE)
    strengths = torch.randint(1, 9, (n, k), generator=g).to(DEVICE, torch.float32)
    found = []
    for decode in (lambda *a: kernels.decode(*a, tile_bytes=4 * 16 * d_sae, use_triton=True), kernels.decode_reference):
        values = strengths.clone().requires_grad_()
        out = decode(FeatureActs(indices, values, d_sae), W_dec, b_dec)
        (gradient,) = torch.autograd.grad((out * (torch.arange(d_model, device=DEVICE) % 5)).sum(), values)
        found.append((out.detach(), gradient))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks the GPU itself")
def test_this_gpu_adds_up_in_fp32() -> None:
    assert triton_path.multiplies_bf16(torch.device("cuda")) == (torch.cuda.get_device_capability() >= (8, 0))


@pytest.mark.slow
def test_a_bound_a_thousand_times_too_small_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = randn(30, 256), randn(1, 256, seed=1) + randn(4096, 256, seed=2) * 0.02, torch.zeros(4096)
    x *= (x @ W[:1].T).sign()
    monkeypatch.setattr(triton_path, "ROUND_OUT", bound.ROUND_OUT / 1000)
    prepare = kernels.prepare

    def small(W: torch.Tensor, b: torch.Tensor) -> bound.Screen:
        screen = prepare(W, b)
        screen.per_feature /= 1000
        screen.per_group /= 1000
        return screen

    monkeypatch.setattr(kernels, "prepare", small)
    acts, _ = encode(x, W, b, 20)
    with pytest.raises(AssertionError):
        check_against_float64(acts, x, W, b, 20)

"""Screening in bf16 gives the fp32 answer, and its bound holds on input made to break it."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
import pickle

import pytest
import torch

from qwen_scope.errors import InputError
from qwen_scope.sae import FeatureActs, TopK, kernels
from qwen_scope.sae.kernels import bound, dispatch, screened

NUMBA = pytest.param(
    True, id="numba",
    marks=pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="the extra `fast` is not installed"),
)  # fmt: skip
WAYS = [pytest.param(False, id="torch"), NUMBA]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near_ties() -> tuple[torch.Tensor, ...]:
    """Every feature is one direction but for the last bits, so bf16 sees nothing but ties."""
    base = randn(1, 64).repeat(2048, 1)
    return randn(40, 64, seed=1), base + randn(2048, 64, seed=2) * 1e-6, torch.zeros(2048)


def clustered() -> tuple[torch.Tensor, ...]:
    base = randn(64, 96).repeat_interleave(32, 0)
    return randn(40, 96, seed=1), base * (1 + randn(2048, 1, seed=2) * 1e-5), torch.zeros(2048)


def wild_norms() -> tuple[torch.Tensor, ...]:
    scale = 10.0 ** torch.linspace(-6, 6, 2048)[torch.randperm(2048, generator=torch.Generator().manual_seed(3))]
    return (
        randn(40, 64) * 10.0 ** torch.linspace(-8, 8, 40)[:, None],
        randn(2048, 64, seed=1) * scale[:, None],
        randn(2048, seed=2),
    )


def sinks() -> tuple[torch.Tensor, ...]:
    x = randn(60, 128)
    x[0] *= 1000
    x[:, 5] += 300
    x[7, [5, 17]] = 12000.0
    return x, randn(2048, 128, seed=1), randn(2048, seed=2)


def subnormal() -> tuple[torch.Tensor, ...]:
    x, W = randn(40, 64), randn(2048, 64, seed=1)
    x[:10] *= 1e-39
    W[:100] *= 1e-39
    W[100:200] *= 1e-30
    x[10:20] *= 1e-20
    return x, W, torch.cat([torch.full((1024,), 1e-40), torch.zeros(1024)])


def equal_rows() -> tuple[torch.Tensor, ...]:
    return randn(1, 64).repeat(40, 1), randn(1, 64, seed=1).repeat(2048, 1), torch.zeros(2048)


def few_positive() -> tuple[torch.Tensor, ...]:
    return randn(40, 64), randn(2048, 64, seed=1) * 0.1, torch.full((2048,), -2.0)


def none_positive() -> tuple[torch.Tensor, ...]:
    return randn(40, 64), randn(2048, 64, seed=1) * 0.1, torch.full((2048,), -1e4)


def large_bias() -> tuple[torch.Tensor, ...]:
    return randn(40, 64), randn(2048, 64, seed=1), randn(2048, seed=2) * 1e4


def ragged() -> tuple[torch.Tensor, ...]:
    return randn(37, 50), randn(2013, 50, seed=1), randn(2013, seed=2)


def zero_rows() -> tuple[torch.Tensor, ...]:
    return torch.zeros(40, 64), randn(2048, 64, seed=1), randn(2048, seed=2)


def quantised() -> tuple[torch.Tensor, ...]:
    """Whole numbers: the answer is exact in any order, and equal pre-activations are common."""
    x = torch.randint(-3, 4, (40, 64), generator=torch.Generator().manual_seed(0)).float()
    W = torch.randint(-3, 4, (2048, 64), generator=torch.Generator().manual_seed(1)).float()
    return x, W, torch.zeros(2048)


CASES = [
    near_ties, clustered, wild_norms, sinks, subnormal, equal_rows, few_positive, none_positive, large_bias, ragged,
    zero_rows, quantised,
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)


def check_against_float64(acts: FeatureActs, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int) -> None:
    """The k largest by float64, but for pre-activations that fp32 cannot tell apart."""
    x, W, b = x.double(), W.double(), b.double()
    exact = x @ W.T + b
    room = bound.gamma(x.shape[1]) * (x.abs() @ W.abs().T + b.abs()) + 1e-36
    assert acts.values.shape == (len(x), k)
    assert (acts.values.diff(dim=1) <= 0).all()
    used = acts.values > 0
    at = acts.indices.long()
    assert (acts.indices[~used] == 0).all()
    error = (acts.values.double() - exact.gather(1, at)).abs()
    assert (error <= room.gather(1, at))[used].all()
    for row in range(len(x)):
        mine = at[row][used[row]]
        assert len(mine.unique()) == len(mine)
        rest = torch.ones(len(W), dtype=torch.bool)
        rest[mine] = False
        floor = (exact[row, mine] + room[row, mine]).min() if len(mine) == k else 0.0
        assert (exact[row, rest] - room[row, rest] <= floor).all()
    ties = (acts.values[:, 1:] == acts.values[:, :-1]) & used[:, 1:]
    assert (acts.indices.diff(dim=1)[ties] > 0).all()


@every_case
@pytest.mark.parametrize("fast", WAYS)
@pytest.mark.parametrize("k", [1, 7, 30])
def test_the_answer_is_the_fp32_one(case, fast: bool, k: int) -> None:
    x, W, b = case()
    kept = W.clone(), b.clone(), x.clone()
    acts, stats = kernels.encode_topk_screened(x, W, b, k, kernels.prepare(W, b), use_numba=fast)
    check_against_float64(acts, x, W, b, k)
    assert stats.path == ("screened+numba" if fast else "screened")
    assert stats.rows == len(x)
    assert all(torch.equal(a, b) for a, b in zip(kept, (W, b, x), strict=True))


@pytest.mark.parametrize("fast", WAYS)
@pytest.mark.parametrize("k", [1, 7, 30])
def test_where_fp32_is_exact_nothing_differs(fast: bool, k: int) -> None:
    x, W, b = quantised()
    acts, stats = kernels.encode_topk_screened(x, W, b, k, kernels.prepare(W, b), use_numba=fast)
    truth = kernels.encode_topk_reference(x, W, b, k)
    assert torch.equal(acts.indices, truth.indices)
    assert torch.equal(acts.values, truth.values)
    assert stats.fallback < len(x)


@pytest.mark.parametrize("fast", WAYS)
def test_ordinary_rows_need_no_fallback_and_few_candidates(fast: bool) -> None:
    x, W, b = randn(300, 256), randn(8192, 256, seed=1), randn(8192, seed=2)
    x[:, 3] += 200
    screen = kernels.prepare(W, b)
    acts, stats = kernels.encode_topk_screened(x, W, b, 20, screen, use_numba=fast)
    check_against_float64(acts, x, W, b, 20)
    assert screen.massive == (3,)
    assert stats.fallback == 0
    assert 20 * 300 <= stats.candidates < 3 * 20 * 300


@pytest.mark.parametrize("fast", WAYS)
def test_rows_that_bf16_cannot_part_fall_back_and_are_counted(fast: bool) -> None:
    x, W, b = equal_rows()
    x = x * (1 if (x[0] @ W[0]) > 0 else -1)
    acts, stats = kernels.encode_topk_screened(x, W, b, 3, kernels.prepare(W, b), use_numba=fast)
    assert stats.fallback == stats.rows == 40
    check_against_float64(acts, x, W, b, 3)


@every_case
def test_the_bound_is_never_exceeded(case) -> None:
    x, W, b = case()
    for dims in ((), bound.massive_dimensions(x), (0, 3, 17)):
        screen = kernels.prepare(W, b)
        bound.keep_massive(screen, W, dims)
        low, allowed, truth = measured(x, W, b, screen)
        assert ((low - truth).abs() <= allowed).all()


def measured(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, screen: bound.Screen) -> tuple[torch.Tensor, ...]:
    """The bf16 product, what the bound allows for, and the truth in float64."""
    rows = bound.lower_rows(x, screen)
    low = torch.mm(rows.low, screen.low.T)[:, : len(W)].double()
    allowed = bound.bound(rows, screen.per_feature)[:, : len(W)].double() + bound.ROUND_OUT * low.abs()
    return low, allowed, x.double() @ W.double().T + b.double()


@pytest.mark.parametrize("d_model", [1, 64, 2**14])
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-20, 1.0, 1e12])
def test_norms_taken_in_fp32_are_never_below_the_true_ones(d_model: int, scale: float) -> None:
    W = randn(40, d_model) * scale
    W[0], W[1] = scale, scale * (1 + 2.0**-9)
    screen = kernels.prepare(W, torch.zeros(40))
    lost = (W - W.bfloat16().float()).double()
    assert screen.usable
    assert (screen.per_feature[:40, 1].double() >= W.double().norm(dim=1)).all()
    assert (screen.per_feature[:40, 0].double() >= lost.norm(dim=1)).all()
    # The same of rows, with and without massive dimensions, which may hold nearly all of a row.
    bound.keep_massive(screen, W, (0,))
    for x in (W, W * torch.cat([torch.full((1,), 100.0), torch.ones(d_model - 1)])):
        rows = bound.lower_rows(x, screen)
        terms, x = rows.terms[rows.covered].double(), x[rows.covered]
        rest, near = x[:, 1:].double(), x[:, 1:].bfloat16().double()
        assert len(x)
        assert (terms[:, 0] >= near.norm(dim=1)).all()
        assert (terms[:, 1] >= (rest - near).norm(dim=1)).all()


def test_wider_residuals_than_that_are_not_screened() -> None:
    assert not kernels.prepare(torch.ones(40, 2**14 + 1), torch.zeros(40)).usable


def test_the_bound_holds_where_all_rounding_goes_one_way() -> None:
    """Residues parallel to what they multiply: Cauchy-Schwarz becomes an equality, so half of the bound is used."""
    W = torch.full((512, 64), 1 + 2.0**-9 - 2.0**-20)
    x = torch.full((4, 64), 1 + 2.0**-9 - 2.0**-20)
    b = torch.zeros(512)
    low, allowed, truth = measured(x, W, b, kernels.prepare(W, b))
    used = ((low - truth).abs() / allowed).max()
    assert 0.45 < used <= 1


def test_a_bound_a_thousand_times_too_small_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """On features so alike that bf16 puts many in the wrong order, yet few enough at the top to be certified."""
    x, W, b = randn(100, 256), randn(1, 256, seed=1) + randn(8192, 256, seed=2) * 0.02, torch.zeros(8192)
    x *= (x @ W[:1].T).sign()
    screen = kernels.prepare(W, b)
    low, allowed, truth = measured(x, W, b, screen)
    assert ((low - truth).abs() > allowed / 1000).any()
    monkeypatch.setattr(screened, "ROUND_OUT", screened.ROUND_OUT / 1000)
    small = dataclasses.replace(
        screen, per_feature=screen.per_feature / 1000, per_group=screen.per_group / 1000, lock=screen.lock
    )
    acts, _ = kernels.encode_topk_screened(x, W, b, 20, small, use_numba=False)
    with pytest.raises(AssertionError):
        check_against_float64(acts, x, W, b, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_stored_in_half(dtype: torch.dtype) -> None:
    x, W, b = randn(40, 64), randn(2048, 64, seed=1).to(dtype), randn(2048, seed=2)
    sae = TopK(W, W.T, b, torch.zeros(64), k=7)
    check_against_float64(sae.encode(x), x, W, b, 7)
    if dtype == torch.bfloat16 and importlib.util.find_spec("numba"):
        acts, stats = kernels.encode_topk_screened(x, W, b, 7, kernels.prepare(W, b))
        check_against_float64(acts, x, W, b, 7)
        assert stats.path == "screened+numba"
    else:
        with pytest.raises(InputError, match="can't be screened"):
            kernels.encode_topk_screened(x, W, b, 7, kernels.prepare(W, b), use_numba=False)


@pytest.mark.parametrize("fast", WAYS)
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (3, 5, 64), (64,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_rows(shape: tuple[int, ...], dtype: torch.dtype, fast: bool) -> None:
    W, b = randn(2048, 64, seed=1), randn(2048, seed=2)
    x = randn(*shape).to(dtype)
    acts, _ = kernels.encode_topk_screened(x, W, b, 5, kernels.prepare(W, b), use_numba=fast)
    assert acts.shape == x.shape[:-1]
    check_against_float64(acts.reshape(x.shape[:-1].numel()), x.reshape(-1, 64), W, b, 5)


@pytest.mark.parametrize("fast", WAYS)
@pytest.mark.parametrize("tile", [1, 100_000, 2**25])
def test_tiles_change_nothing(tile: int, fast: bool) -> None:
    x, W, b = quantised()
    screen = kernels.prepare(W, b)
    acts, _ = kernels.encode_topk_screened(x, W, b, 7, screen, tile, use_numba=fast)
    assert torch.equal(acts.to_dense(), kernels.encode_topk_reference(x, W, b, 7).to_dense())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_rows_that_are_not_covered_take_the_fp32_product(bad: float) -> None:
    x, W, b = ragged()  # 50 dimensions: no whole number of any matrix unit's blocks
    x[3, 2] = bad
    acts, stats = kernels.encode_topk_screened(x, W, b, 7, kernels.prepare(W, b))
    assert stats.fallback == 1
    truth = kernels.encode_topk_reference(x, W, b, 7)
    assert torch.equal(acts.values[3].isfinite(), truth.values[3].isfinite())
    others = [i for i in range(len(x)) if i != 3]
    check_against_float64(acts[torch.tensor(others)], x[others], W, b, 7)


def test_weights_that_are_not_finite_are_never_screened() -> None:
    x, W, b = ragged()
    W[9, 9] = math.nan
    screen = kernels.prepare(W, b)
    assert not screen.usable
    with pytest.raises(InputError, match="can't be screened"):
        kernels.encode_topk_screened(x, W, b, 7, screen)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small dictionaries are screened too."""
    monkeypatch.setattr(dispatch, "FEWEST_WEIGHTS", 1)
    if not screened.cpu_multiplies_bf16():
        pytest.skip("this CPU has no bf16 instructions")


def sae(k: int = 7) -> TopK:
    return TopK(randn(2048, 64, seed=1), randn(64, 2048, seed=2), randn(2048, seed=3), torch.zeros(64), k=k)


@pytest.mark.usefixtures("eager")
def test_the_path_is_chosen_for_each_call_and_says_so() -> None:
    one = sae()
    assert one.encode_stats is None
    one.encode(randn(600, 64))
    assert one.encode_stats is not None
    assert one.encode_stats.path.startswith("screened")
    one.encode(randn(1, 64))
    assert one.encode_stats == kernels.EncodeStats("plain", 1)
    assert "encoder" not in repr(one)


@pytest.mark.usefixtures("eager")
def test_preparing_waits_for_enough_rows() -> None:
    one = sae()
    paths = []
    for _ in range(8):
        one.encode(randn(100, 64))
        paths.append(one.encode_stats.path)
    waited = dispatch.PREPARE_AFTER // 100
    assert 0 < waited < 8
    assert paths[:waited] == ["plain"] * waited
    assert all(path.startswith("screened") for path in paths[waited:])


@pytest.mark.usefixtures("eager")
def test_every_k_is_answered() -> None:
    x = randn(600, 64)
    for k in (1, 32, 33, 2048):
        one = sae(k)
        acts = one.encode(x)
        assert one.encode_stats.path == "plain" if k > 32 else one.encode_stats.path.startswith("screened")
        check_against_float64(acts[:20], x[:20], one.W_enc, one.b_enc, k)


@pytest.mark.usefixtures("eager")
def test_the_copy_is_dropped_with_the_weights_it_was_made_from() -> None:
    one, x = sae(), randn(600, 64)
    one.encode(x)
    for other in (one.to(dtype=torch.float32), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other.encode_stats is None
        assert other._encoder.screen is None
    with torch.no_grad():
        one.W_enc.mul_(-1)
    check_against_float64(one.encode(x)[:20], x[:20], one.W_enc, one.b_enc, 7)


@pytest.mark.usefixtures("eager")
def test_a_cpu_without_bf16_takes_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screened, "cpu_multiplies_bf16", lambda: False)
    one = sae()
    one.encode(randn(600, 64))
    assert one.encode_stats.path == "plain"


def test_what_is_kept_beside_the_weights_is_counted() -> None:
    weights = (randn(64, 16), randn(16, 64, seed=1), randn(64, seed=2), randn(16, seed=3))
    sae = TopK(*weights, k=4)
    alone = 4 * (2 * 64 * 16 + 64 + 16)
    assert (sae.nbytes, sae.cached_bytes) == (alone, 0)
    screen = sae._encoder.screen_for(sae.W_enc, sae.b_enc, dispatch.PREPARE_AFTER)
    assert screen is not None
    sums = sae._encoder.sums
    assert sums is not None
    kept = [screen.low, screen.per_feature, screen.per_group, sums.rows, sums.columns, sums.bias]
    assert sae.nbytes == alone + sum(tensor.numel() * tensor.element_size() for tensor in kept)

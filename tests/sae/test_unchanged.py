"""Weights written to in any way are noticed before the bf16 copy is used again, and copies of features are ties."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qwen_scope.sae import FeatureActs, JumpReLU, TopK, kernels
from qwen_scope.sae.kernels import dispatch, screened
from qwen_scope.sae.kernels.unchanged import checksums, twins

D_MODEL, D_SAE, K = 64, 2048, 7


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "FEWEST_WEIGHTS", 1)
    if not screened.cpu_multiplies_bf16():
        pytest.skip("this CPU has no bf16 instructions")


def sae(dtype: torch.dtype = torch.float32) -> TopK:
    W = randn(D_SAE, D_MODEL, seed=1).to(dtype)
    return TopK(W, W.T.contiguous(), randn(D_SAE, seed=3), torch.zeros(D_MODEL), k=K)


def swap_rows(one: TopK) -> None:
    one.W_enc.data[[0, 9]] = one.W_enc.data[[9, 0]]


def swap_columns(one: TopK) -> None:
    one.W_enc.data[:, [0, 9]] = one.W_enc.data[:, [9, 0]]


def permute(one: TopK) -> None:
    one.W_enc.data.copy_(one.W_enc[torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))].clone())


def numpy(one: TopK) -> None:
    one.W_enc.detach().numpy()[:] *= -1


def numpy_row(one: TopK) -> None:
    one.W_enc.detach().numpy()[5] = one.W_enc.detach().numpy()[5] * 100


def numpy_element(one: TopK) -> None:
    one.W_enc.detach().numpy()[5, 7] += 50.0


def numpy_bias(one: TopK) -> None:
    one.b_enc.detach().numpy()[11] = 1000.0


WRITES: dict[str, Callable[[TopK], object]] = {
    "mul": lambda one: one.W_enc.mul_(-1),
    "data.mul": lambda one: one.W_enc.data.mul_(-1),
    "data.neg": lambda one: one.W_enc.data.neg_(),
    "data.copy": lambda one: one.W_enc.data.copy_(randn(D_SAE, D_MODEL, seed=8)),
    "data one row": lambda one: one.W_enc.data[9].mul_(100),
    "data one element": lambda one: one.W_enc.data[9, 9].add_(50.0),
    "data one column": lambda one: one.W_enc.data[:, 9].add_(5.0),
    "data two elements": lambda one: (one.W_enc.data[9, 9].add_(32.0), one.W_enc.data[9, 10].sub_(32.0)),
    "data.zero": lambda one: one.W_enc.data.zero_(),
    "swap rows": swap_rows,
    "swap columns": swap_columns,
    "permute": permute,
    "numpy": numpy,
    "numpy row": numpy_row,
    "numpy element": numpy_element,
    "numpy bias": numpy_bias,
    "bias.data": lambda one: one.b_enc.data.add_(torch.linspace(0, 9, D_SAE)),
    "set": lambda one: torch.Tensor.set_(one.W_enc, randn(D_SAE, D_MODEL, seed=8)),  # pyright: ignore
    "assigned data": lambda one: setattr(one.W_enc, "data", randn(D_SAE, D_MODEL, seed=8)),
    "swapped on the object": lambda one: object.__setattr__(one, "W_enc", randn(D_SAE, D_MODEL, seed=8)),
}


def expected(one: TopK, x: Tensor) -> FeatureActs:
    pre = x.double() @ one.W_enc.detach().double().T + one.b_enc.detach().double()
    return FeatureActs.from_dense(pre.relu().float(), K)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("write", list(WRITES))
@pytest.mark.parametrize("rows", [64, 300])
def test_every_write_is_noticed(write: str, rows: int) -> None:
    one, x = sae(), randn(600, D_MODEL)
    one.encode(x)
    assert one.encode_stats is not None
    assert one.encode_stats.path.startswith("screened")
    WRITES[write](one)
    for _ in range(2):
        torch.testing.assert_close(
            one.encode(x[:rows]).to_dense(), expected(one, x[:rows]).to_dense(), rtol=1e-4, atol=1e-3
        )
    one.encode(x)
    assert one.encode_stats.path.startswith("screened"), "the copy is made again"


@pytest.mark.usefixtures("eager")
def test_bf16_weights_too() -> None:
    one, x = sae(torch.bfloat16), randn(600, D_MODEL)
    one.encode(x)
    one.W_enc.data[3].mul_(64)
    torch.testing.assert_close(one.encode(x).to_dense(), expected(one, x).to_dense(), rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("eager")
def test_what_did_not_change_is_not_prepared_again() -> None:
    one, x = sae(), randn(600, D_MODEL)
    one.encode(x)
    screen = one._encoder.screen
    one.encode(x)
    one.encode(x[:64])
    assert one._encoder.screen is screen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 3, 8, 64])
def test_sums_see_every_single_change(dtype: torch.dtype, width: int) -> None:
    W, b = randn(70, width).to(dtype), randn(70)
    for matrix in (W, randn(width, 70).to(dtype).T):
        before = checksums(matrix, b)
        assert before.same_as(checksums(matrix.clone(memory_format=torch.preserve_format), b))
        for i in range(0, 70, 9):
            changed = matrix.clone(memory_format=torch.preserve_format)
            changed[i, i % width] = -changed[i, i % width]
            assert not before.same_as(checksums(changed, b))
        bias = b.clone()
        bias[7] = torch.nextafter(bias[7], torch.tensor(9.0))
        assert not before.same_as(checksums(matrix, bias))


def test_copies_are_found_and_nothing_else() -> None:
    W, b = randn(200, 16), randn(200)
    W[150], b[150] = W[20], b[20]
    W[199], b[199] = W[20], b[20]
    W[30] = W[31]  # another bias
    W[40:60] = 0
    b[40:60] = 0  # never active
    W[70], b[70] = W[71].flip(0), b[71]  # equal sums, other rows
    found = twins(W, b, checksums(W, b))
    assert found is not None
    assert list(zip(found.features.tolist(), found.first.tolist(), strict=True)) == [(20, 20), (150, 20), (199, 20)]
    assert twins(randn(200, 16), b, checksums(randn(200, 16), b)) is None


def copied(dtype: torch.dtype = torch.float32) -> TopK:
    """Every feature of the upper half is a copy of one of the lower half."""
    one = sae(dtype)
    one.W_enc[D_SAE // 2 :] = one.W_enc[: D_SAE // 2].flip(0)
    one.b_enc[D_SAE // 2 :] = one.b_enc[: D_SAE // 2].flip(0)
    return one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 17, 100])
def test_copies_are_ties_on_the_plain_path(dtype: torch.dtype, rows: int) -> None:
    one, x = copied(dtype), randn(rows, D_MODEL, seed=5)
    check_ties(one, one.encode(x))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_are_ties_in_rows_that_fall_back(dtype: torch.dtype) -> None:
    one, x = copied(dtype), randn(600, D_MODEL, seed=5)
    x[::3] = 1e-30  # bf16 can't part these
    x[1::50] *= 2.0**52  # nor does the bound cover these
    one.encode(x)
    acts = one.encode(x)
    assert one.encode_stats is not None
    assert one.encode_stats.fallback > 0
    check_ties(one, acts)


def jumping(dtype: torch.dtype = torch.float32) -> JumpReLU:
    """The same copies, each with the threshold of its original."""
    one = copied(dtype)
    threshold = randn(D_SAE, seed=4).abs()
    threshold[D_SAE // 2 :] = threshold[: D_SAE // 2].flip(0)
    return JumpReLU(one.W_enc, one.W_dec, one.b_enc, one.b_dec, threshold)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 17, 100, 1000])
def test_copies_are_ties_where_a_threshold_chooses(dtype: torch.dtype, rows: int) -> None:
    one, x = jumping(dtype), randn(rows, D_MODEL, seed=5)
    acts = one.encode(x)
    check_ties(one, acts)
    pre = x.double() @ one.W_enc.double().T + one.b_enc.double()
    truth = torch.where(pre > one.threshold, pre.relu(), 0).float()
    near = (pre - one.threshold).abs() < 1e-4
    torch.testing.assert_close(acts.to_dense()[~near], truth[~near], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tile_bytes", [4 * 64 * 100, 4 * 64 * 700, 2**20])
def test_copies_are_ties_across_tiles(tile_bytes: int) -> None:
    """bf16 weights are widened a few features at a time, so a copy and its original meet only when tiles are merged."""
    one, x = jumping(torch.bfloat16), randn(7, D_MODEL, seed=5)
    found = twins(one.W_enc, one.b_enc, checksums(one.W_enc, one.b_enc))
    check_ties(one, kernels.encode_threshold(x, one.W_enc, one.b_enc, one.threshold, tile_bytes, twins=found))


@pytest.mark.parametrize("rows", [1, 5, 17, 100])
def test_copies_are_ties_in_the_references(rows: int) -> None:
    one, x = jumping(), randn(rows, D_MODEL, seed=5)
    check_ties(one, kernels.encode_threshold_reference(x, one.W_enc, one.b_enc, one.threshold))
    check_ties(one, kernels.encode_topk_reference(x, one.W_enc, one.b_enc, K))


@pytest.mark.parametrize("way", ["pytorch", "numba", "triton"])
def test_copies_are_ties_whatever_recomputes_the_candidates(way: str) -> None:
    pytest.importorskip({"pytorch": "torch", "numba": "numba", "triton": "triton"}[way])
    one, x = copied(), randn(70 if way != "triton" else 4, D_MODEL, seed=5)
    x[1] *= 2.0**52  # the bound does not cover this row
    found = twins(one.W_enc, one.b_enc, checksums(one.W_enc, one.b_enc))
    acts, stats = kernels.encode_topk_screened(
        x, one.W_enc, one.b_enc, K, kernels.prepare(one.W_enc, one.b_enc), twins=found,
        use_numba=way == "numba", use_triton=way == "triton",
    )  # fmt: skip
    assert 0 < stats.fallback < len(x)
    check_ties(one, acts)


def test_a_threshold_may_be_written_to_and_copies_part() -> None:
    one, x = jumping(), randn(5, D_MODEL, seed=5)
    one.encode(x)
    one.threshold[: D_SAE // 2] = 1e9
    assert one.encode(x).indices[one.encode(x).values > 0].min() >= D_SAE // 2


def check_ties(one: TopK | JumpReLU, acts: FeatureActs) -> None:
    """Where an upper copy is chosen, its original stands before it with the same value."""
    half = D_SAE // 2
    for features, values in zip(acts.indices.tolist(), acts.values.tolist(), strict=True):
        where = {f: slot for slot, (f, v) in enumerate(zip(features, values, strict=True)) if v > 0}
        for feature, slot in where.items():
            if feature >= half:
                original = D_SAE - 1 - feature
                assert original in where, "the lower index comes first"
                assert values[where[original]] == values[slot]
                assert where[original] < slot


def test_copies_that_are_none_any_more_get_their_own_values() -> None:
    one, x = copied(), randn(5, D_MODEL, seed=5)
    one.encode(x)
    one.W_enc.detach().numpy()[D_SAE // 2 :] *= -2
    torch.testing.assert_close(one.encode(x).to_dense(), expected(one, x).to_dense(), rtol=1e-4, atol=1e-3)


def test_the_reference_knows_no_copies() -> None:
    """Equal to the definition wherever no features are equal."""
    one, x = sae(), randn(40, D_MODEL)
    truth = kernels.encode_topk_reference(x, one.W_enc, one.b_enc, K)
    torch.testing.assert_close(one.encode(x).to_dense(), truth.to_dense(), rtol=1e-5, atol=1e-5)

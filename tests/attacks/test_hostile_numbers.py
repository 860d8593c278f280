"""Numbers chosen against the fast encode: whatever comes in, it answers as the reference does or refuses as it does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_scope.errors import InputError
from qwen_scope.sae import TopK, kernels
from qwen_scope.sae.kernels import dispatch, screened

EXPONENTS = st.integers(-140, 120)


def spread(rows: int, columns: int, low: int, high: int, seed: int) -> torch.Tensor:
    """Random signs and digits, with exponents of two drawn evenly between `low` and `high`."""
    g = torch.Generator().manual_seed(seed)
    exponents = torch.randint(min(low, high), max(low, high) + 1, (rows, columns), generator=g)
    return torch.ldexp(torch.randn(rows, columns, generator=g).double(), exponents).float()


@given(a=EXPONENTS, b=EXPONENTS, c=EXPONENTS, k=st.integers(1, 16), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_range_of_exponents(a: int, b: int, c: int, k: int, seed: int) -> None:
    x, W = spread(9, 24, a, b, seed), spread(1024, 24, min(a, c), max(b, c), seed + 1)
    bias = spread(1, 1024, a, c, seed + 2)[0]
    screen = kernels.prepare(W, bias)
    if not screen.usable:
        with pytest.raises(InputError, match="can't be screened"):
            kernels.encode_topk_screened(x, W, bias, k, screen)
        return
    truth = kernels.encode_topk_reference(x, W, bias, k)
    sizes = (x.double().abs() @ W.double().abs().T + bias.double().abs()).amax(1, keepdim=True)
    room = 1e-5 * sizes + 1e-36
    acts, stats = kernels.encode_topk_screened(x, W, bias, k, screen, use_numba=False)
    assert stats.rows == 9
    finite = truth.values.isfinite().all(1)
    assert torch.equal(acts.values.isfinite().all(1), finite)
    # Sorted values compare slot by slot, however ties within rounding were settled.
    off = (acts.values.double() - truth.values.double()).abs()
    assert (off <= room)[finite].all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "W_enc", "b_enc"])
def test_what_is_not_finite_is_refused_on_the_fast_path_too(
    bad: float, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "FEWEST_WEIGHTS", 1)
    if not screened.cpu_multiplies_bf16():
        pytest.skip("this CPU has no bf16 instructions")
    parts = {"x": torch.ones(600, 50), "W_enc": torch.ones(2013, 50), "b_enc": torch.zeros(2013)}
    parts[where].view(-1)[-1] = bad
    sae = TopK(parts["W_enc"], parts["W_enc"].T, parts["b_enc"], torch.zeros(50), k=3)
    if bad == -float("inf") and where == "b_enc":
        # A bias of minus infinity switches a feature off; a residual or a matrix that holds one can't be right.
        assert (sae.encode(parts["x"]).values[:599] == 50).all()
        return
    with pytest.raises(InputError, match="not finite"):
        sae.encode(parts["x"])

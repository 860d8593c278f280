"""`compare_saes` against sets and dense rows."""

from __future__ import annotations

import pytest
import torch
from sae_toys import residuals, toy

from qwen_scope.errors import InputError, MismatchError
from qwen_scope.sae import compare_saes


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_against_dense_rows(kind: str) -> None:
    a, b = toy(kind), toy(kind).to(dtype=torch.bfloat16)
    x = residuals(200)
    found = compare_saes(a, b, x)
    u, v = a.encode(x).to_dense(), b.encode(x).to_dense()
    both, either = ((u > 0) & (v > 0)).sum(-1), ((u > 0) | (v > 0)).sum(-1)
    assert found.jaccard == pytest.approx(float((both / either).mean()))
    assert found.value_error == pytest.approx(float((u - v).norm() / u.norm()), rel=1e-4)
    assert 0.9 < found.jaccard < 1
    assert (found.rows, found.random) == (200, False)


def test_without_residuals_it_draws_some() -> None:
    found = compare_saes(toy(), toy(), rows=10)
    assert (found.jaccard, found.value_error, found.rows, found.random) == (1.0, 0.0, 10, True)


def test_another_sae_shares_little_and_another_width_is_refused() -> None:
    assert compare_saes(toy(), toy(layer=9), residuals()).jaccard < 0.2
    with pytest.raises(MismatchError, match="64 x 16 and 32 x 16"):
        compare_saes(toy(), toy(d_sae=32))
    with pytest.raises(InputError, match="no residual"):
        compare_saes(toy(), toy(), torch.zeros(0, 16))

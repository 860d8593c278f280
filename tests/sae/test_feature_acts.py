"""`FeatureActs`: its invariants, and that its forms say the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from qwen_scope.errors import InputError
from qwen_scope.sae import FeatureActs


@st.composite
def dense_rows(draw: DrawFn, width: int | None = None) -> torch.Tensor:
    """Few distinct values, so that equal ones are common; some rows empty, some shapes with several dimensions."""
    shape = draw(st.sampled_from([(0,), (1,), (4,), (2, 3), (2, 0), ()]))
    width = width or draw(st.integers(1, 9))
    n = int(torch.tensor(shape).prod()) * width if shape else width
    values = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]), min_size=n, max_size=n))
    return torch.tensor(values).reshape(*shape, width)


@given(dense_rows())
def test_dense_and_back(dense: torch.Tensor) -> None:
    acts = FeatureActs.from_dense(dense)
    assert acts.shape == dense.shape[:-1]
    assert torch.equal(acts.to_dense(), dense.clamp(min=0))
    again = FeatureActs.from_dense(acts.to_dense())
    assert torch.equal(again.indices, acts.indices)
    assert torch.equal(again.values, acts.values)


@given(dense_rows(), st.integers(0, 9))
def test_slots_stand_in_order_and_unused_ones_are_zero(dense: torch.Tensor, k: int) -> None:
    acts = FeatureActs.from_dense(dense, k)
    assert acts.k == min(k, dense.shape[-1])
    assert acts.indices.dtype == torch.int32
    for indices, values in zip(acts.reshape(-1).indices.tolist(), acts.reshape(-1).values.tolist(), strict=True):
        used = [(-value, index) for index, value in zip(indices, values, strict=True) if value > 0]
        assert used == sorted(used)
        assert all(i == 0 for i, v in zip(indices[len(used) :], values[len(used) :], strict=True) if v == 0)
        assert not any(values[len(used) :])


@given(dense_rows(width=6), st.lists(st.integers(0, 5), unique=True))
def test_select_reads_columns(dense: torch.Tensor, features: list[int]) -> None:
    assert torch.equal(FeatureActs.from_dense(dense).select(features), dense.clamp(min=0)[..., features])


@settings(max_examples=50)
@given(st.lists(dense_rows(width=4).filter(lambda d: d.ndim == 2), min_size=1, max_size=4))
def test_cat_is_cat(parts: list[torch.Tensor]) -> None:
    joined = FeatureActs.cat([FeatureActs.from_dense(part) for part in parts])
    assert torch.equal(joined.to_dense(), torch.cat(parts).clamp(min=0))


def test_rows_are_indexed_and_reshaped() -> None:
    dense = torch.rand(4, 3, 7)
    acts = FeatureActs.from_dense(dense)
    assert torch.equal(acts[1].to_dense(), dense[1])
    assert torch.equal(acts[1, 2].to_dense(), dense[1, 2])
    assert torch.equal(acts[1:, ::2].to_dense(), dense[1:, ::2])
    assert torch.equal(acts.reshape(-1).to_dense(), dense.reshape(-1, 7))
    assert torch.equal(acts.active(), (dense > 0).sum(-1))


def test_what_does_not_fit_is_refused() -> None:
    acts = FeatureActs.from_dense(torch.rand(2, 5))
    with pytest.raises(InputError, match="feature 5 does not exist"):
        acts.select([5])
    with pytest.raises(InputError, match="twice"):
        acts.select([1, 1])
    with pytest.raises(InputError, match="2 indices for rows of 1"):
        acts[0, 0]
    with pytest.raises(InputError, match="several widths"):
        FeatureActs.cat([acts, FeatureActs.from_dense(torch.rand(2, 6))])
    with pytest.raises(InputError, match="none or several"):
        FeatureActs.cat([])

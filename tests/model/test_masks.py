"""The one spelling of which tokens count."""

from __future__ import annotations

import math

import pytest
import torch

from qwen_scope.errors import InputError
from qwen_scope.model import TokenMask
from qwen_scope.text import special_ids


def test_a_sink_is_longer_than_so_many_medians() -> None:
    h = torch.tensor([[3.0, 4.0], [6.0, 8.01], [30.0, 40.0], [math.nan, 1.0]])
    assert TokenMask(sink_multiple=2).sinks_at(h, 5.0).tolist() == [False, True, True, False]
    assert TokenMask(sink_multiple=2).sinks_at(h[:, None], 5.0).shape == (4, 1)
    assert not TokenMask().sinks_at(h, 5.0).any()
    # A length that half precision can't hold.
    assert TokenMask(sink_multiple=2).sinks_at(torch.full((1, 4), 6e4, dtype=torch.float16), 5e4).all()


def test_special_tokens_are_those_of_the_tokenizer(tokenizer) -> None:
    known = special_ids(tokenizer)
    assert set(tokenizer.all_special_ids) <= known
    ids = torch.tensor([[*sorted(known)[:2], len(tokenizer) - 1], [0, 1, 2]])
    assert TokenMask.of(tokenizer, True, None).special_at(ids).tolist() == [[int(i) in known for i in r] for r in ids]
    assert not TokenMask.of(tokenizer, False, 10.0).special_at(ids).any()


@pytest.mark.parametrize("multiple", [1, 0, -3, math.nan])
def test_a_multiple_that_would_leave_out_ordinary_tokens_is_refused(multiple: float) -> None:
    with pytest.raises(InputError, match="would leave out ordinary tokens; 10 is usual"):
        TokenMask(sink_multiple=multiple)

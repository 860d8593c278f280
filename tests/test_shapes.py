"""The checker that the tests run under refuses what a signature does not say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import shapes
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from qwen_scope.sae import FeatureActs, Identity

if TYPE_CHECKING:
    from nowhere import Unknown


@shapes.checked
def plain(n: int, share: float = 0.5) -> str:
    return "x" * n if share else n  # pyright: ignore


@shapes.checked
def product(x: Float[Tensor, "n d"], y: Float[Tensor, "d m"]) -> Float[Tensor, "n m"]:
    return x @ y if x[0, 0] else x


@shapes.checked
def lines(n: int) -> Iterator[str]:
    yield from map(str, range(n))


@shapes.checked
def lenient(one: Unknown) -> Unknown:
    return one


@shapes.checked
@dataclass
class Point:
    x: int

    @classmethod
    @shapes.checked
    def of(cls, text: str) -> Point:
        return cls(int(text))


def test_what_fits_passes() -> None:
    assert plain(2) == "xx"
    assert plain(n=1, share=1) == "x", "a whole number is a float"
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert list(lines(2)) == ["0", "1"]
    assert lenient("what no interpreter knows") == "what no interpreter knows"
    assert Point.of("3") == Point(3)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: plain("2"),
        lambda: plain(2, share="all"),
        lambda: plain(2, 0),
        lambda: product(torch.ones(2, 3), torch.ones(2, 4)),
        lambda: product(torch.zeros(2, 3), torch.ones(3, 4)),
        lambda: lines("2"),
        lambda: Point("3"),
        lambda: Point.of(3),
        lambda: Identity("group", "2", "f"),
        lambda: FeatureActs(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4), 5),
    ],
)
def test_what_does_not_fit_is_refused(wrong: Any) -> None:
    """The last two are the package's own: the hook reaches its rooms."""
    with pytest.raises(TypeCheckError):
        wrong()

"""A passage begins with a word; maps of one kind have one scale."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_scope.report import Heatmap, draw, word_start


@pytest.mark.parametrize(
    ("tokens", "at", "start"),
    [
        (["ing", " the", " dog"], 2, 1),
        (["ing", ",", " the"], 2, 2),
        (["ing", "\n", "The", "re"], 3, 1),
        (["ing", "s"], 1, 1),
        ([" the"], 0, 0),
        (["的", "车站", "在"], 2, 0),
        (["ing", "駅", "は"], 2, 1),
    ],
)
def test_a_passage_begins_with_a_word(tokens: list[str], at: int, start: int) -> None:
    assert word_start(tokens, at) == start
    assert word_start(tokens, at, at_start=True) == 0


def test_maps_with_given_ends_have_equal_shades_for_equal_values() -> None:
    def fill(values: list[list[float]], *ends: float) -> str:
        drawn = str(draw(Heatmap("m", ["a"], ["x", "y"], np.array(values), *ends)))
        return drawn.split("fill=&#34;")[0] if "fill=" not in drawn else drawn.split('fill="rgb')[1].split('"')[0]

    assert fill([[0.5, 1.0]], 0.0, 1.0) == fill([[0.5, 0.6]], 0.0, 1.0)
    assert fill([[0.5, 1.0]]) != fill([[0.5, 0.6]], 0.0, 1.0)
    assert Heatmap("m", ["a"], ["x"], np.array([[np.nan]])).ends == (0.0, 1.0)

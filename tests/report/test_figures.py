"""Figures: what is drawn is what was given, and text in it stays text."""

from __future__ import annotations

import re

import numpy as np
import pytest

from qwen_scope.report import Curves, Heatmap, Line, Points, figure_page, save_png, thinned

CURVES = Curves(
    "<b>one</b>", "x & y", "y", [Line("$a$", [1, 10, 100], [0.0, 0.5, 1.0], [0, 0.4, 1], [0.1, 0.6, 1])], True
)
POINTS = Points("points", "x", "y", ["<i>p</i>", "q"], [1.0, 2.0], [3.0, 3.0])
HEATMAP = Heatmap("heat", ["r<1>", "r2"], ["c1", "c2", "c3"], np.array([[0.0, 0.5, 1.0], [np.nan, 0.25, 0.75]]))


def test_a_page_is_self_contained_and_inert() -> None:
    page = figure_page("<script>", [("t", ("a", "b"), [("<x>", 0.5), (None, 3)])], [CURVES, POINTS, HEATMAP], ["a < b"])
    assert not re.search(r"<(script|b|i|x)>", page)
    assert not re.search(r"(src|href)=", page)
    for text in ("&lt;script&gt;", "&lt;x&gt;", "a &lt; b", "x &amp; y", "r&lt;1&gt;"):
        assert text in page
    assert page.count("<svg") == 3
    assert page.count("<rect") == 5, "a cell without a value is left blank"


def test_curves_stand_where_their_values_say() -> None:
    page = figure_page("t", [], [CURVES])
    where = re.search(r'<polyline points="([^"]+)"', page)
    assert where
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in where[1].split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2), "equal factors are equally far on a logarithmic axis"
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert "<polygon" in page


@pytest.mark.parametrize("figure", [CURVES, POINTS, HEATMAP], ids=lambda f: type(f).__name__)
def test_png(figure, tmp_path) -> None:
    save_png(figure, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_thinned_keeps_both_ends() -> None:
    assert thinned(5) == [0, 1, 2, 3, 4]
    some = thinned(1000, 10)
    assert (some[0], some[-1], len(some)) == (0, 999, 10)

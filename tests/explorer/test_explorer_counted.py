"""Tokens that do not count: marked wherever chips are shown, absent from rankings, and told in a sentence."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from explored import LAYER

from qwen_scope import load_scope
from qwen_scope.explorer import AppState
from qwen_scope.explorer.api import Api
from qwen_scope.explorer.look.compare import compared, left_out_at, shading
from qwen_scope.explorer.look.explore import (
    Reading,
    heat_panel,
    text_features_panel,
    token_features_panel,
    tokens_panel,
)  # fmt: skip
from qwen_scope.text import Counted

TEXT, OTHER = "Wo ist der Bahnhof, bitte?", "Where is the station, please?"
POINT = f"layers.{LAYER}.resid_post"
SINKS = 2


def nobody(layer: int, feature: int) -> None:
    return None


@pytest.fixture(scope="module")
def counted() -> AppState:
    """A state in which the first token and, at `LAYER`, the two longest of the others of `TEXT` do not count."""
    scope = load_scope("lab", device="cpu", counted=Counted.everything())
    norms = scope.capture(scope.tokenize([TEXT]), [LAYER])[LAYER][0, 1:].norm(dim=-1).sort(descending=True).values
    limits = {
        **{f"layers.{layer}.resid_post": None for layer in scope.layers},
        POINT: float(norms[SINKS - 1 : SINKS + 1].mean()),
    }
    scope.counted.set(Counted(1, norms=limits))
    return AppState(scope)


def marked(markup: str) -> list[bool]:
    """Per chip whether it is marked."""
    found = re.findall(r'<(?:button|span) [^>]*class="qs-token([^"]*)"', markup)
    return ["qs-left-out" in classes for classes in found]


def test_chips_are_marked_and_rankings_leave_them_out(counted: AppState) -> None:
    seen = counted.seen(TEXT, LAYER)
    out = [bool(why) for why in seen.left_out(0, LAYER)]
    assert out[0]
    assert sum(out) == 1 + SINKS
    reading = Reading(TEXT, "plain", LAYER).with_default_choice(seen)
    assert not out[reading.token], "the token that is chosen first counts"
    chips, _, said = tokens_panel(seen, reading, nobody).partition("</div>")
    assert marked(chips) == out
    assert f"left out: 1 first token, {SINKS} sinks of {len(out)} tokens" in said
    assert 'title="token 0' in chips
    assert "left out: first" in chips
    assert "left out: sink" in chips

    dense = seen.of(0, LAYER).to_dense().numpy()
    kept = dense[[i for i, gone in enumerate(out) if not gone]]
    values = dense[:, reading.feature]
    assert f"fires on {(kept[:, reading.feature] > 0).sum()} of {len(kept)} tokens" in chips
    assert reading.feature == kept.max(0).argmax()
    assert values[reading.token] == kept.max()
    ranked = [int(f) for f in re.findall(r'data-pick="feature:(\d+)"', text_features_panel(seen, reading, nobody))]
    order = sorted(range(dense.shape[1]), key=lambda f: (-kept[:, f].max(), f))[: len(ranked)]
    assert ranked == order
    assert "left out: first" in token_features_panel(seen, Reading(TEXT, "plain", LAYER, 0, 1), nobody)


def test_the_heat_map_shows_those_that_count_or_all(counted: AppState) -> None:
    seen = counted.seen(TEXT, LAYER)
    reading = Reading(TEXT, "plain", LAYER).with_default_choice(seen)
    tokens, left = len(seen.tokens[0]), 1 + SINKS
    for only, shown in ((True, tokens - left), (False, tokens)):
        markup = heat_panel(seen, replace(reading, only_counted=only), nobody)
        head, _, body = markup.partition("<tbody>")
        assert head.count("<th ") == 1 + shown
        assert head.count("left out: ") == (0 if only else left)
        assert body.partition("</tr>")[0].count("<td") == shown
    alone = counted.seen("a", LAYER)
    one = Reading("a", "plain", LAYER).with_default_choice(alone)
    assert "No token of this text counts" in heat_panel(alone, one, nobody)
    assert one.token == 0


def test_compared_texts_mark_them_too(counted: AppState) -> None:
    layers = [LAYER - 1, LAYER]
    found, seen = counted.compare([TEXT], [OTHER], layers, 3, [])
    a, b, ranking = compared(found, seen, 1, nobody)
    for i, side in enumerate((a, b)):
        why = left_out_at(seen, i)
        assert marked(side) == [bool(one) for one in why]
        assert why[0] == "first"
    assert f"sink at layer {LAYER}" in left_out_at(seen, 0)
    sinks = seen.tally(LAYER)["sink"]
    assert f"layer {LAYER - 1}: left out: 2 first tokens of" in ranking
    assert f"layer {LAYER}: left out: 2 first tokens, {sinks} sink" in ranking
    # A feature that is strongest on a token left out: the shading's top is that of the tokens that count.
    counts = seen.counts(0, LAYER).numpy()
    dense = seen.of(0, LAYER).to_dense().numpy()
    feature = int((dense.max(0) - dense[counts].max(0) - 1e9 * (dense[counts].max(0) == 0)).argmax())
    shares = dict(shading(seen, (range(1), range(1, 2)), LAYER, feature)["a"])
    others = seen.of(1, LAYER).to_dense().numpy()[seen.counts(1, LAYER).numpy(), feature]
    top = max(dense[counts, feature].max(), others.max())
    for i, value in enumerate(dense[:, feature].tolist()):
        assert shares.get(i, 0.0) == pytest.approx(min(1.0, value / top), abs=1e-3)


def test_the_interface_says_why_a_token_does_not_count(counted: AppState) -> None:
    told = Api(counted).features(TEXT, LAYER)
    seen = counted.seen(TEXT, LAYER)
    assert [one["left_out"] for one in told["tokens"]] == seen.left_out(0, LAYER)
    assert all(one["features"] for one in told["tokens"]), "features of every token are told"


def test_where_every_token_counts_nothing_is_said(counted: AppState) -> None:
    scope = load_scope("lab", device="cpu", counted=Counted.everything())
    seen = scope.features([TEXT], [LAYER])
    panel = tokens_panel(seen, Reading(TEXT, "plain", LAYER).with_default_choice(seen), nobody)
    assert "left out" not in panel
    assert not any(marked(panel))

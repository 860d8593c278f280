"""Interventions against the formulas written out with plain tensors, their JSON, and what they refuse."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_scope.errors import InputError, MismatchError, NotFoundError, QwenScopeError
from qwen_scope.model import HookPoint, LayerStats
from qwen_scope.sae import Identity, JumpReLU, TopK
from qwen_scope.steer import Intervention, Where, activations, activations_reference, change_reference

SAE = tiny.random_sae(2)
D, W = tiny.D_MODEL, tiny.D_SAE


def residuals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def dense(h: torch.Tensor, sae=SAE) -> torch.Tensor:
    """Activations by the published formula, nothing of ours."""
    pre = (h @ sae.W_enc.T + sae.b_enc).relu()
    top = pre.topk(sae.k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values)


def one_active(h: torch.Tensor) -> int:
    return int(dense(h).sum(0).argmax())


def stats(**changes) -> LayerStats:
    given_ = {"norm_median": 8.0, "feature_max": np.full(W, 3.0, np.float32)} | changes
    return LayerStats(HookPoint(2), 1, 9, "nine tokens", norm_quantiles={0.5: 8.0}, **given_)


def test_add_is_equation_one() -> None:
    h = residuals(4, 3)
    out = Intervention.add(layer=2, feature=7, amount=2.5).apply(h, SAE)
    assert torch.equal(out, h + 2.5 * SAE.W_dec[:, 7])
    direction = residuals(1)[0]
    out = Intervention.add(layer=2, direction=direction, amount=-1.5).apply(h)
    torch.testing.assert_close(out, h - 1.5 * direction)


@pytest.mark.parametrize(
    ("make", "new"),
    [
        (lambda f: Intervention.scale(layer=2, feature=f, amount=3.0), lambda a: 3 * a),
        (lambda f: Intervention.clamp(layer=2, feature=f, amount=4.0), lambda a: torch.full_like(a, 4.0)),
        (lambda f: Intervention.ablate(layer=2, feature=f), lambda a: torch.zeros_like(a)),
    ],
)
def test_feature_operations_add_the_difference_of_two_reconstructions(make, new) -> None:
    """The reconstruction error stays: x + (x_hat' - x_hat), both decoded by the plain formula."""
    h = residuals(50)
    feature = one_active(h)
    a = dense(h)
    changed = a.clone()
    changed[:, feature] = new(a[:, feature])
    assert 0 < (a[:, feature] > 0).sum() < 50, "active on some rows and not on others"
    expected = h + (changed @ SAE.W_dec.T + SAE.b_dec) - (a @ SAE.W_dec.T + SAE.b_dec)
    out = make(feature).apply(h, SAE)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    if make(feature).op != "clamp":
        asleep = a[:, feature] == 0
        assert torch.equal(out[asleep], h[asleep])


def test_what_changes_nothing_returns_the_residual_itself() -> None:
    h = residuals(5)
    silent = int((dense(h).sum(0) == 0).nonzero()[0])
    for one in (
        Intervention.add(layer=2, feature=3, amount=0.0),
        Intervention.scale(layer=2, feature=one_active(h), amount=1.0),
        Intervention.scale(layer=2, feature=silent, amount=9.0),
        Intervention.ablate(layer=2, feature=silent),
        Intervention.ablate(layer=2, direction=[1.0] * D, amount=0.0),
    ):
        assert one.apply(h, SAE) is h, one


def test_ablating_a_direction_leaves_nothing_along_it_and_all_else() -> None:
    h, d = residuals(20), 7 * residuals(1, seed=1)[0]
    u = d / d.norm()
    out = Intervention.ablate(layer=2, direction=d).apply(h)
    torch.testing.assert_close(out @ u, torch.zeros(20), atol=1e-5, rtol=0)
    across = torch.eye(D) - torch.outer(u, u)
    torch.testing.assert_close(out @ across, h @ across, atol=1e-5, rtol=1e-5)
    half = Intervention.ablate(layer=2, direction=d, amount=0.5).apply(h)
    torch.testing.assert_close(half @ u, h @ u / 2, atol=1e-5, rtol=1e-5)


def test_bfloat16_stays_bfloat16() -> None:
    h = residuals(3).bfloat16()
    for one in (
        Intervention.add(layer=2, feature=1, amount=1.0),
        Intervention.clamp(layer=2, feature=1, amount=1.0),
        Intervention.ablate(layer=2, direction=[1.0] * D),
    ):
        assert one.apply(h, SAE).dtype == torch.bfloat16


def test_units() -> None:
    """resid_norm: the change is that many residuals long; max_act: multiples of the largest activation."""
    h = torch.zeros(1, D)
    for one in (
        Intervention.add(layer=2, feature=5, amount=0.5, unit="resid_norm"),
        Intervention.add(layer=2, direction=residuals(1)[0], amount=-0.5, unit="resid_norm"),
    ):
        moved = one.resolve(stats(), SAE).apply(h, SAE) - h
        assert float(moved.norm()) == pytest.approx(0.5 * 8.0, rel=1e-5)
    resolved = Intervention.clamp(layer=2, feature=5, amount=2.0, unit="max_act").resolve(stats(), SAE)
    assert (resolved.amount, resolved.unit) == (6.0, "raw")
    raw = Intervention.add(layer=2, feature=5, amount=2.0)
    assert raw.resolve() is raw


@pytest.mark.parametrize(("rows", "k"), [(1, 6), (9, 6), (200, 6), (3, W)])
def test_cheap_activations_are_the_encoders(rows: int, k: int) -> None:
    sae = replace(SAE, k=k)
    h = residuals(rows, seed=rows)
    features = sorted({one_active(h), 0, 1, W - 1})
    torch.testing.assert_close(activations(sae, h, features), activations_reference(sae, h, features))
    assert torch.equal(activations(sae, h, features) > 0, dense(h, sae)[:, features] > 0)


def test_cheap_activations_of_a_wide_dictionary() -> None:
    """Wide enough that a sample of it settles most features."""
    sae = tiny.random_sae(1, d_sae=4096, k=16)
    h = residuals(8)
    wanted = dense(h, sae).sum(0).topk(3).indices.tolist() + list(range(0, 4096, 97))
    for feature in wanted:
        for rows in (h[:1], h):
            found = activations(sae, rows, [feature])
            assert torch.equal(found, activations_reference(sae, rows, [feature])), feature
    nan = torch.full((1, D), math.nan)
    with pytest.raises(InputError, match="not finite"):
        activations(sae, nan, [3])


def test_cheap_activations_break_ties_like_the_encoder() -> None:
    """Equal pre-activations: the lower index comes first, and only k fit."""
    sae = TopK(torch.ones(W, D), torch.ones(D, W), torch.zeros(W), torch.zeros(D), k=4)
    h = torch.ones(2, D)
    for feature in (0, 3, 4, 90):
        assert torch.equal(activations(sae, h, [feature]), activations_reference(sae, h, [feature]))
    assert float(activations(sae, h, [3])[0, 0]) == D
    assert float(activations(sae, h, [4])[0, 0]) == 0


def test_cheap_activations_of_a_jumprelu() -> None:
    threshold = torch.linspace(0, 10, W)
    sae = JumpReLU(SAE.W_enc, SAE.W_dec, SAE.b_enc, SAE.b_dec, threshold)
    h = residuals(40)
    features = [0, 17, 50, 95]
    torch.testing.assert_close(activations(sae, h, features), activations_reference(sae, h, features))


def test_interventions_on_one_residual_do_not_depend_on_order() -> None:
    h = residuals(30)
    f, g = dense(h).sum(0).topk(2).indices.tolist()
    several = [
        Intervention.ablate(layer=2, direction=residuals(1)[0]),
        Intervention.clamp(layer=2, feature=f, amount=5.0),
        Intervention.add(layer=2, feature=g, amount=1.0),
        Intervention.scale(layer=2, feature=g, amount=0.5),
    ]
    torch.testing.assert_close(
        change_reference(several, h, SAE), change_reference(several[::-1], h, SAE), atol=1e-4, rtol=1e-4
    )


EVERY = [
    Intervention.add(layer=2, feature=5, amount=0.5, unit="resid_norm"),
    Intervention.add(layer=0, direction=[0.1, -2.0, 1e-30], amount=3),
    Intervention.scale(layer=2, feature=5, amount=-1.0, where="prompt"),
    Intervention.clamp(layer=2, feature=5, amount=2.0, unit="max_act", where="generated,0,2,5-8"),
    Intervention.ablate(layer=2, feature=5, sae=SAE.identity),
    Intervention.ablate(layer=2, direction=[1.0, 0.0], amount=0.5, where="3"),
    Intervention.ablate(layer=2, feature=5, sae=Identity("g", None, "")),
]


@pytest.mark.parametrize("one", EVERY, ids=lambda i: f"{i.op}-{i.where}")
def test_json_round_trip(one: Intervention) -> None:
    again = Intervention.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False)))
    assert again == one
    assert hash(again) == hash(one)


def test_interventions_are_frozen() -> None:
    with pytest.raises(AttributeError):
        EVERY[0].amount = 3.0  # pyright: ignore[reportAttributeAccessIssue]


GOOD = EVERY[0].to_json()


@pytest.mark.parametrize(
    "change",
    [
        {"op": "explode"},
        {"op": None},
        {"hook_point": "nowhere"},
        {"hook_point": 3},
        {"feature": -1},
        {"feature": "5"},
        {"feature": True},
        {"feature": None},
        {"amount": float("nan")},
        {"amount": "0.5"},
        {"amount": True},
        {"amount": 1e9},
        {"unit": "furlong"},
        {"unit": 3},
        {"where": "everywhere"},
        {"where": ""},
        {"where": ["all"]},
        {"direction": [1.0]},
        {"feature": None, "direction": "abc"},
        {"feature": None, "direction": [0.0, 0.0]},
        {"feature": None, "direction": [1.0, float("inf")]},
        {"feature": None, "direction": [[1.0]]},
        {"sae": "tiny"},
        {"sae": {"group": "g", "layer": "2", "fingerprint": ""}},
        {"strength": 3},
    ],
    ids=str,
)
def test_bad_json_is_refused_in_one_sentence(change) -> None:
    with pytest.raises(QwenScopeError) as error:
        Intervention.from_json(GOOD | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [None, [], "add", {}, {"op": "add"}])
def test_json_that_is_no_intervention(data) -> None:
    with pytest.raises(QwenScopeError):
        Intervention.from_json(data)


@pytest.mark.parametrize("amount", [math.nan, math.inf, -math.inf, 1e7])
def test_absurd_amounts(amount: float) -> None:
    with pytest.raises(InputError, match="amount"):
        Intervention.add(layer=2, feature=0, amount=amount)


def test_absurd_in_other_units() -> None:
    with pytest.raises(InputError, match="absurd"):
        Intervention.add(layer=2, feature=0, amount=101, unit="resid_norm")
    with pytest.raises(InputError, match="absurd"):
        Intervention.add(layer=2, feature=0, amount=50, unit="resid_norm").resolve(stats(norm_median=1e8), SAE)


def test_what_does_not_fit() -> None:
    h = residuals(2)
    with pytest.raises(InputError, match=r"feature 96 does not exist.* 0 to 95"):
        Intervention.ablate(layer=2, feature=W).apply(h, SAE)
    with pytest.raises(MismatchError, match=r"is at layers\.1"):
        Intervention.ablate(layer=1, feature=0).apply(h, SAE)
    with pytest.raises(MismatchError, match="made for the SAE"):
        Intervention.ablate(layer=2, feature=0).bound(SAE).apply(h, replace(SAE, identity=Identity("other", 2, "ff")))
    with pytest.raises(MismatchError, match="3 numbers"):
        Intervention.add(layer=2, direction=[1.0, 2.0, 3.0], amount=1).apply(h)
    with pytest.raises(InputError, match="needs its SAE"):
        Intervention.ablate(layer=2, feature=0).apply(h)
    with pytest.raises(InputError, match="has to be resolved"):
        EVERY[0].apply(h, SAE)
    with pytest.raises(InputError, match="needs the statistics"):
        EVERY[0].resolve(None, SAE)
    with pytest.raises(InputError, match="statistics are of"):
        Intervention.add(layer=0, feature=1, amount=1, unit="resid_norm").resolve(stats(), tiny.random_sae(0))
    with pytest.raises(InputError, match="never active in nine tokens"):
        Intervention.clamp(layer=2, feature=1, amount=1, unit="max_act").resolve(stats(feature_max=None), SAE)
    with pytest.raises(InputError, match="has no amount"):
        Intervention.ablate(layer=2, feature=1, amount=0.5)
    with pytest.raises(NotFoundError, match="did you mean 'add'"):
        Intervention.from_json(GOOD | {"op": "ad"})
    with pytest.raises(InputError, match="not finite"):
        Intervention.ablate(layer=2, feature=0).apply(h * math.nan, SAE)


@pytest.mark.parametrize(
    ("text", "says", "tokens"),
    [
        ("all", "all", range(12)),
        ("prompt", "prompt", range(6)),
        ("generated", "generated", range(6, 12)),
        ("generated, prompt", "all", range(12)),
        ("0,2,5-8", "0,2,5-8", [0, 2, 5, 6, 7, 8]),
        ("8,7,2-3,3-4", "2-4,7-8", [2, 3, 4, 7, 8]),
        ("generated,1", "generated,1", [1, *range(6, 12)]),
        ("all,3", "all", range(12)),
    ],
)
def test_where(text: str, says: str, tokens) -> None:
    where = Where.parse(text)
    assert str(where) == says
    assert Where.parse(says) == where
    mask = where.mask(torch.arange(12)[None], torch.tensor([[6]]))
    assert mask[0].nonzero().flatten().tolist() == list(tokens)


@pytest.mark.parametrize("text", ["", " ", "5-", "-5", "8-5", "0;2", "a", "1.5", "0,,2", "all the", "٣", "9" * 12])
def test_unreadable_positions_are_refused(text: str) -> None:
    with pytest.raises(InputError) as error:
        Where.parse(text)
    assert "\n" not in str(error.value)


@given(st.sets(st.integers(0, 40), min_size=1), st.sets(st.integers(0, 40), min_size=1))
def test_where_as_sets(a: set[int], b: set[int]) -> None:
    first, second = (Where.parse(",".join(map(str, s))) for s in (a, b))
    mask = first.mask(torch.arange(50)[None], torch.tensor([[3]]))
    assert set(mask[0].nonzero().flatten().tolist()) == a
    assert first.reach == max(a)
    assert first.overlaps(second) == bool(a & b)

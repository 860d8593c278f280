"""Perplexity, repetition and KL against transformers' own losses; the sweep's table and its proposal."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from qwen_scope.errors import InputError
from qwen_scope.features import Budget, Continuations, SweepOptions, sweep
from qwen_scope.steer import (
    Decoding,
    Intervention,
    Row,
    log_probabilities,
    matches,
    next_token_kl,
    perplexity,
    repetition,
    script,
    steering,
    target_values,
)

TEXTS = ["The weather is fine today.", "车站在哪里？", "Guten Morgen! Wo ist der Bahnhof"]
STEER = [Intervention.add(layer=0, feature=3, amount=4.0)]


def rows(scope, start: int = 1) -> list[Row]:
    return [Row(tuple(scope.tokenizer(text)["input_ids"]), start) for text in TEXTS]


def test_perplexity_is_transformers_own_loss(scope) -> None:
    scored = log_probabilities(scope.model, rows(scope))
    for row, found in zip(rows(scope), scored, strict=True):
        ids = torch.tensor([row.ids])
        loss = scope.model(ids, labels=ids).loss
        assert len(found) == len(row.ids) - 1
        assert perplexity([found]) == pytest.approx(float(loss.exp()), rel=1e-4)
    late = log_probabilities(scope.model, rows(scope, 3))
    np.testing.assert_allclose(late[0], scored[0][2:])
    assert np.isnan(perplexity([]))


def test_kl_of_one_row_by_hand(scope) -> None:
    found = next_token_kl(scope.model, rows(scope), STEER, scope.saes)
    for row, values in zip(rows(scope), found, strict=True):
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            p = scope.model(ids).logits.softmax(-1)
            with steering(scope.model, STEER, scope.saes):
                q = scope.model(ids).logits.softmax(-1)
        expected = (p * (p / q).log()).sum(-1)[0, :-1]
        np.testing.assert_allclose(values, expected.numpy(), rtol=1e-3, atol=1e-5)
        assert (values > 0).all()
    assert not np.concatenate(next_token_kl(scope.model, rows(scope), [], scope.saes)).any()


def test_repetition() -> None:
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 12) == pytest.approx(0.9)
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)
    assert repetition([]) == repetition([1, 2, 3]) == 0


def test_targets() -> None:
    assert target_values(matches(r"\d+"), ["a1", "b"]).tolist() == [1, 0]
    assert target_values(script("cyrillic"), ["да", "нет ok", "", "12"]).tolist() == [1.0, 0.6, 0.0, 0.0]
    assert target_values(script("CJK"), ["车站x"]).tolist() == [pytest.approx(2 / 3)]
    with pytest.raises(InputError, match="not a regular expression"):
        matches("(")
    with pytest.raises(InputError, match="no letter"):
        script("klingon")
    for wrong in (lambda t: np.zeros(5), lambda t: np.array([np.nan] * len(t))):
        with pytest.raises(InputError, match="one finite number per text"):
            target_values(wrong, ["a"])


def run(scope, interventions=None, target=None, **options):
    options.setdefault("decoding", Decoding(max_new_tokens=6))
    asked = {name: options.pop(name) for name in ("amounts", "lower", "budget", "refine") if name in options}
    if "amounts" in asked:
        asked["amounts"] = tuple(asked["amounts"])
    return sweep(
        scope,
        TEXTS,
        interventions or [Intervention.add(layer=0, feature=3, amount=1.0, unit="resid_norm")],
        target or (lambda texts: np.array([len(set(text)) for text in texts], float)),
        SweepOptions(**asked),
        **options,
    )


@pytest.mark.slow
def test_a_sweep_measures_every_amount_and_proposes_within_the_budget(scope) -> None:
    found = run(scope, budget=Budget(1e9, 1.0), refine=0)
    assert [dose.amount for dose in found.doses] == [0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.2, 1.6]
    assert found.doses[0].kl == 0
    kl = [dose.kl for dose in found.doses[1:]]
    assert kl == sorted(kl), "a longer change moves the distribution further"
    effects = {dose.amount: dose.effect.estimate for dose in found.doses}
    best = max(effects.values())
    expected = min(a for a, e in effects.items() if e == best)
    assert found.proposed == (expected or None)
    json.dumps(found.to_json(), allow_nan=False)
    nothing = run(scope, budget=Budget(1.0, 0.0), target=lambda texts: np.zeros(len(texts)))
    assert nothing.proposed is None
    assert nothing.best is None


def test_lowering_and_negative_amounts(scope) -> None:
    found = run(scope, amounts=[-0.5, 0.5], lower=True, budget=Budget(1e9, 1.0), refine=1)
    assert {dose.amount for dose in found.doses} == {0.0, -0.5, 0.5}
    if found.best:
        assert found.best.effect.estimate < found.doses[0].effect.estimate


def test_the_budget_counts_from_the_reference(scope) -> None:
    ids = [scope.tokenizer(text)["input_ids"] for text in TEXTS]
    known = [Row(tuple(row), 2) for row in ids]
    found = run(scope, amounts=[0.2, 0.4, 1.6], reference=known, budget=Budget(1.0, 1.0), refine=0)
    assert found.reference == perplexity(log_probabilities(scope.model, known))
    for dose in found.doses:
        assert dose.fits == (dose.perplexity <= found.reference)
    assert run(scope, amounts=[0.2], refine=0).reference != found.reference


@pytest.mark.slow
def test_tolerance_proposes_a_smaller_amount_that_does_nearly_as_much(scope) -> None:
    wide = Budget(1e9, 1.0)
    found = run(
        scope, target=Continuations((" hello",)), amounts=[-0.2, -0.4, -0.8, 0.2, 0.4, 0.8], budget=wide, refine=0
    )
    plain = found.doses[0].effect.estimate
    effects = {dose.amount: dose.effect.estimate for dose in found.doses[1:]}
    best = max(effects.values())
    assert best > plain
    for tolerance in (0.0, 1e-3, 0.1, 0.5):
        close = [a for a, e in effects.items() if e > plain and e >= best - tolerance]
        proposed = run(
            scope,
            target=Continuations((" hello",)),
            amounts=list(effects),
            budget=Budget(1e9, 1.0, tolerance),
            refine=0,
        ).proposed
        assert abs(proposed) == min(map(abs, close))


@pytest.mark.slow
def test_the_grid_follows_the_residual_norm_whatever_the_unit(scope) -> None:
    length = float(scope.saes[0].W_dec[:, 3].norm())
    found = run(scope, [Intervention.add(layer=0, feature=3, amount=7.0)], budget=Budget(1e9, 1), refine=0)
    lengths = [dose.amount * 7.0 * length / scope.stats[0].norm_median for dose in found.doses[1:]]
    assert lengths == pytest.approx([0.1, 0.2, 0.4, 0.6, 0.8, 1.2, 1.6])
    assert [d.amount for d in run(scope, [Intervention.ablate(layer=0, feature=3)], refine=0).doses] == [0.0, 1.0]


def test_continuations_as_a_target(scope) -> None:
    found = run(scope, target=Continuations((" hello",)), amounts=[0.5], refine=0)
    ids = [scope.tokenizer(text)["input_ids"] for text in TEXTS]
    more = scope.tokenizer(" hello")["input_ids"]
    values = log_probabilities(scope.model, [Row((*row, *more), len(row)) for row in ids])
    assert found.doses[0].effect.estimate == pytest.approx(float(np.mean([v.mean() for v in values])))


def test_bad_sweeps(scope) -> None:
    with pytest.raises(InputError, match="two prompts"):
        sweep(scope, ["a"], STEER, matches("a"))
    with pytest.raises(InputError, match="at least one finite amount"):
        run(scope, amounts=[0.0])
    with pytest.raises(InputError, match="nothing to dose"):
        run(scope, [Intervention.add(layer=0, feature=3, amount=0.0)])
    with pytest.raises(InputError, match="budget"):
        Budget(0.5)

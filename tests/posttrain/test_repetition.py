"""Features of repetition: loops are found in answers and texts, turns are cut where they begin, amounts are tried."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from qwen_scope import load_scope
from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, changing
from qwen_scope.posttrain import Detector, Sampling, loop_share, repetition_recipe
from qwen_scope.posttrain.repetition import AMOUNTS, ENOUGH, amount_of, beginning, begun, loops_in, loops_of
from qwen_scope.scope import Scope

COLD = Sampling(24, temperature=1e-3, detector=Detector(4, 3, 9))
PROMPTS = ["hello ", "Wo ist der ", "def ", "is it ", "the ", "und ", "a b ", "yes "]


@pytest.fixture(scope="module")
def scope() -> Scope:
    folder = tiny.folder()
    return load_scope(str(folder / "model"), str(folder / "sae"))


def test_loops_of_answers_and_of_texts_are_tokens_with_a_loop_in_them(scope) -> None:
    found = loop_share(scope.model, scope.tokenizer, PROMPTS, COLD)
    answers = [one for one in found.answers if one.loop is not None]
    assert answers, "the tiny model repeats itself"
    for (ids, loop), one in zip(loops_of(scope, PROMPTS, answers), answers, strict=True):
        asked = scope.tokenizer(PROMPTS[one.prompt])["input_ids"]
        assert ids == [*asked, *one.ids]
        assert ids[loop.start :] == list(one.ids[one.loop.start :])
    texts = ["yes " + "no no? " * 5, "no loop at all here"]
    [(ids, loop)] = loops_in(scope, texts, Detector(8, 4, 8))
    assert ids == scope.tokenizer(texts[0])["input_ids"]
    assert ids[loop.start + loop.period :] == ids[loop.start : -loop.period]
    [text] = begun(scope, [(ids, loop)])
    assert texts[0].startswith(text)
    assert text.count("no?") == 2


def test_features_are_ranked_by_what_makes_a_turn_begin(scope) -> None:
    """By the definition: each feature's part in the residual times the gradient of the first token of turns 2 and 3."""
    looping = loops_in(scope, ["yes " + "no no? " * 5, "a b " * 8], Detector(8, 4, 8))
    found = beginning(scope, looping, [2], 4)
    sae, effects = scope.saes[2], torch.zeros(scope.saes[2].d_sae)
    for ids, loop in looping:
        for turn in (1, 2):
            at = loop.start + turn * loop.period
            kept: list[torch.Tensor] = []

            def hold(h: torch.Tensor, point: HookPoint, kept: list[torch.Tensor] = kept) -> torch.Tensor:
                kept.append(h.detach().requires_grad_())
                return kept[-1]

            with torch.enable_grad(), changing(scope.model, {HookPoint(2): hold}):
                logits = scope.model(torch.tensor([ids[:at]]), use_cache=False).logits[0, -1]
                said = logits.log_softmax(-1)[ids[at]]
            [gradient] = torch.autograd.grad(said, kept)
            effects += (sae.encode(kept[0].detach()).to_dense() * (gradient @ sae.W_dec)).sum((0, 1)) / (
                2 * len(looping)
            )
    order = [f for f in effects.argsort(descending=True)[:4].tolist() if effects[f] > 0]
    assert order
    assert [one.feature for one in found] == order
    assert [one.effect for one in found] == pytest.approx(effects[order].tolist(), rel=1e-3)


@pytest.mark.slow
def test_the_first_amount_that_makes_half_loop_is_taken(scope) -> None:
    looping = loops_in(scope, ["yes " + "no no? " * 5, "a b " * 8], Detector(8, 4, 8))
    drivers = beginning(scope, looping, scope.layers, 3)
    warm = replace(COLD, temperature=1.0)
    amount, interventions = amount_of(scope, PROMPTS, drivers, None, warm, lambda *_: None)
    tried = []
    for each in AMOUNTS:
        _, one = amount_of(scope, PROMPTS, drivers, each, warm, lambda *_: None)
        fresh = replace(warm, seed=warm.seed + 2)
        share = loop_share(scope.model, scope.tokenizer, PROMPTS, fresh, interventions=one, saes=scope.saes).share
        tried.append(share.estimate)
    enough = np.flatnonzero(np.array(tried) >= ENOUGH)
    best = int(enough[0]) if len(enough) else int(np.argmax(tried))
    assert amount == AMOUNTS[best]
    for one, driver in zip(interventions, drivers, strict=True):
        assert (one.layer, one.feature, one.unit) == (driver.layer, driver.feature, "raw")
        length = float(scope.saes[one.layer].W_dec[:, one.feature].norm())
        assert one.amount * length == pytest.approx(amount * scope.stats[one.layer].norm_median, rel=1e-3)


@pytest.mark.slow
def test_a_recipe_holds_its_own_figures(scope) -> None:
    recipe = repetition_recipe(scope, PROMPTS, features=3, amount=0.3, sampling=COLD, looping=["no no? " * 5] * 5)
    effect = recipe.effect
    assert effect["amount"] == 0.3
    assert len(effect["effects"]) == len(recipe.interventions) == 3
    assert effect["causal"] == (effect["raises"]["low"] > 0 and effect["lowers"]["low"] > 0)
    assert effect["raises"]["estimate"] == pytest.approx(effect["amplified"]["estimate"] - effect["normal"]["estimate"])
    known = loop_share(scope.model, scope.tokenizer, PROMPTS, COLD, samples=2)
    given = repetition_recipe(scope, PROMPTS, features=3, amount=0.3, sampling=COLD, found=known)
    assert given.effect["answers"] == len(known.answers) == 2 * effect["answers"]
    with pytest.raises(InputError, match="5 texts that do are the least"):
        repetition_recipe(scope, PROMPTS[:2], sampling=replace(COLD, detector=Detector(1, 12, 24)))

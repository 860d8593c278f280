"""Mixture-of-experts and hybrid models steer like the dense one: no-ops, clean-up, sweep, verdict's conditions."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from qwen_scope.features import Budget, SweepOptions, best_candidate, sweep_candidates
from qwen_scope.foundry import make_model
from qwen_scope.model import LoadedModel
from qwen_scope.sae import TopK
from qwen_scope.scope import SAEs, Scope
from qwen_scope.steer import (
    Decoding,
    Intervention,
    calibrate,
    generate,
    matches,
    side_by_side,
    steering,
)

LAYER, PROMPTS = 2, ["The weather is fine", "Guten Morgen! Wo", "车站在"]


@pytest.fixture(scope="module", params=["moe", "hybrid"])
def opened(request):
    """The family's model, the tiny tokenizer, an SAE and its statistics."""
    model = make_model(request.param, 512, tiny.D_MODEL, 4, tiny.CONTEXT, eos_token_id=1, pad_token_id=0).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder() / "model")
    saes = {LAYER: tiny.random_sae(LAYER)}
    return model, tokenizer, saes, {LAYER: calibrate(model, tokenizer, LAYER, saes[LAYER])}


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_what_changes_nothing_gives_the_same_bits(opened) -> None:
    model, tokenizer, saes, _ = opened
    sae = saes[LAYER]
    dead = TopK(sae.W_enc, sae.W_dec, sae.b_enc.clone().index_fill(0, torch.tensor(9), -1e6), sae.b_dec, sae.k)
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = model(ids).logits
        for one in (
            Intervention.add(layer=LAYER, feature=9, amount=0.0),
            Intervention.add(layer=LAYER, feature=9, amount=0.0, where="1-2"),
            Intervention.scale(layer=LAYER, feature=9, amount=7.0),
            Intervention.ablate(layer=LAYER, feature=9),
            Intervention.ablate(layer=LAYER, feature=9, where="generated,0"),
        ):
            with steering(model, [one], {LAYER: dead}):
                assert torch.equal(model(ids).logits, plain), one
        with steering(model, [Intervention.clamp(layer=LAYER, feature=9, amount=5.0)], {LAYER: dead}):
            assert not torch.equal(model(ids).logits, plain)
    assert hooks(model) == 0


def test_no_hook_is_left_after_an_exception(opened) -> None:
    model, tokenizer, saes, _ = opened
    one = [Intervention.add(layer=LAYER, feature=3, amount=4.0)]

    def boom(row: int, piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, PROMPTS, one, saes=saes, decoding=Decoding(max_new_tokens=20), on_text=boom)
    assert hooks(model) == 0


def test_batches_chunks_and_single_prompts_agree(opened) -> None:
    model, tokenizer, saes, stats = opened
    plan = [
        Intervention.add(layer=LAYER, feature=3, amount=1.0, unit="resid_norm", where="1,generated"),
        Intervention.clamp(layer=LAYER, feature=5, amount=3.0, where="prompt"),
    ]
    new = Decoding(max_new_tokens=8)
    together = generate(model, tokenizer, PROMPTS, plan, saes=saes, stats=stats, decoding=new)
    for prompt, found in zip(PROMPTS, together, strict=True):
        (alone,) = generate(model, tokenizer, [prompt], plan, saes=saes, stats=stats, decoding=new)
        assert alone.text == found.text
    assert [one.text for one in together] != [one.text for one in generate(model, tokenizer, PROMPTS, decoding=new)]


@pytest.mark.slow
def test_a_sweep_over_candidates(opened) -> None:
    model, tokenizer, saes, stats = opened
    candidates = {str(f): [Intervention.add(layer=LAYER, feature=f, amount=1.0, unit="resid_norm")] for f in (3, 5)}
    scope = Scope(
        LoadedModel(model, tokenizer, "family"),
        SAEs(str(tiny.folder() / "sae"), d_model=tiny.D_MODEL, device=torch.device("cpu")),
    )
    scope.stats.set(stats[LAYER])
    found = sweep_candidates(
        scope,
        PROMPTS,
        candidates,
        matches("[aeiou]"),
        SweepOptions((0.3, 1.0), budget=Budget(1e9, 1.0), refine=0),
        decoding=Decoding(max_new_tokens=5),
    )
    assert list(found) == ["3", "5"]
    for one in found.values():
        assert [dose.kl > 0 for dose in one.doses] == [False, True, True]
    best = best_candidate(found)
    effects = {name: one.best.effect.estimate for name, one in found.items() if one.best}
    assert best is None if not effects else effects[best] == max(effects.values())
    (sides,) = side_by_side(
        model, tokenizer, PROMPTS[:1], candidates["3"], saes=saes, stats=stats, decoding=Decoding(max_new_tokens=5)
    )
    assert sides.steered.prompt == sides.unsteered.prompt

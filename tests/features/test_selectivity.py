"""Removals at equal effect: by hand on the tiny model, with a planted feature that knows the concept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch

from qwen_scope import load_scope
from qwen_scope.errors import InputError
from qwen_scope.features import Examples, mean_direction, selectivity
from qwen_scope.model import HookPoint, changing
from qwen_scope.sae import TopK
from qwen_scope.steer import Decoding, Intervention

WORDS = ("Morgen", "Bahnhof", "Wo ist", "bitte sehr"), ("The weather", "today", "is fine", "Where is"), ("a + b", "def")
EXAMPLES = Examples(
    *(tuple(f"{word} {i} {word}" for i in range(6) for word in words) for words in (*WORDS[:2], WORDS[2] * 2))
)


@pytest.fixture(scope="module")
def scope():
    return load_scope(tiny.folder() / "model", tiny.folder() / "sae", device="cpu")


def planted(scope, layer: int = 0) -> TopK:
    """Feature 0 fires exactly on the concept's side of the difference of means, and writes that direction."""
    d = mean_direction(scope, layer, EXAMPLES.positive, EXAMPLES.negative)
    u = d / d.norm()
    sides = [
        scope.capture(scope.tokenize(list(texts)), [layer])[layer][scope.tokenize(list(texts)).attention_mask.bool()]
        @ u
        for texts in (EXAMPLES.positive, EXAMPLES.negative, EXAMPLES.unrelated)
    ]
    threshold = float(torch.cat(sides[1:]).median())
    sae = tiny.random_sae(layer)
    W_enc, W_dec, b_enc = sae.W_enc.clone(), sae.W_dec.clone(), sae.b_enc.clone()
    W_enc[0], W_dec[:, 0], b_enc[0] = u, u, -threshold
    W_enc[1:] /= 1e3  # so that feature 0 is among the k wherever it is positive
    b_enc[1:] = b_enc[1:].abs() / 1e3
    return TopK(W_enc, W_dec, b_enc, sae.b_dec, sae.k, sae.hook_point, sae.identity)


@pytest.mark.slow
def test_both_ways_do_the_same_to_the_concept(scope) -> None:
    saes = {0: planted(scope)}
    found = selectivity(scope, [Intervention.add(layer=0, feature=0, amount=1.0)], EXAMPLES, saes=saes)
    assert 1.0 in (found.features.share, found.direction.share), "the weaker way is used in full"
    weaker = min((found.features, found.direction), key=lambda way: way.full.estimate)
    assert weaker.share == 1.0
    assert found.gap.estimate == pytest.approx(
        found.features.effect.estimate - found.direction.effect.estimate, abs=1e-9
    )
    assert abs(found.gap.estimate) <= 0.1 * abs(weaker.full.estimate) + 1e-3
    assert found.comparable == (found.features.effect.low > 0 and found.direction.effect.low > 0)
    assert found.extra_kl.estimate == pytest.approx(found.direction.kl.estimate - found.features.kl.estimate, abs=1e-9)
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.slow
def test_effect_and_loss_by_hand(scope) -> None:
    saes = {0: planted(scope)}
    found = selectivity(scope, [Intervention.add(layer=0, feature=0, amount=1.0)], EXAMPLES, saes=saes)
    u = mean_direction(scope, 0, EXAMPLES.positive[::2], EXAMPLES.negative[::2])
    u, share = u / u.norm(), found.direction.share

    def loss(text: str, change) -> float:
        ids = torch.tensor([scope.tokenizer(text)["input_ids"]])
        half = ids.shape[1] // 2
        with torch.no_grad(), changing(scope.model, {HookPoint(0): change}):
            scores = scope.model(ids).logits[0, half - 1 : -1].log_softmax(-1)
        return -float(scores.gather(-1, ids[0, half:, None]).mean())

    for texts, expected in (
        (EXAMPLES.positive[1::2], found.direction.effect),
        (EXAMPLES.unrelated, found.direction.loss),
    ):
        rises = [
            loss(text, lambda h, p: h - share * (h @ u)[..., None] * u) - loss(text, lambda h, p: h) for text in texts
        ]
        assert expected.estimate == pytest.approx(float(np.mean(rises)), abs=1e-4)
        assert expected.n == len(texts)


@pytest.mark.slow
def test_a_feature_that_never_fires_removes_nothing_and_costs_nothing(scope) -> None:
    sae = planted(scope)
    sae.b_enc[0] = -1e6
    found = selectivity(scope, [Intervention.add(layer=0, feature=0, amount=1.0)], EXAMPLES, saes={0: sae})
    assert not found.comparable
    for figure in (found.features.full, found.features.kl, found.features.loss, found.features.moved):
        assert figure.estimate == 0
    assert found.direction.full.estimate != 0


@pytest.mark.slow
def test_a_target_instead_of_the_loss(scope) -> None:
    def letters(texts: list[str]) -> np.ndarray:
        return np.array([float(len(set(text))) for text in texts])

    interventions = [Intervention.add(layer=0, feature=0, amount=1.0)]
    decoding = Decoding(max_new_tokens=4)
    found = selectivity(scope, interventions, EXAMPLES, target=letters, decoding=decoding, saes={0: planted(scope)})
    assert found.measured_by == "fall of the target"
    assert found.features.effect.n == len(EXAMPLES.positive) // 2


def test_what_cannot_be_compared(scope) -> None:
    interventions = [Intervention.add(layer=0, feature=0, amount=1.0)]
    with pytest.raises(InputError, match="too few to compare"):
        selectivity(scope, interventions, Examples(EXAMPLES.positive[:5], EXAMPLES.negative, EXAMPLES.unrelated))
    with pytest.raises(InputError, match="name at least one"):
        selectivity(scope, [Intervention.add(layer=0, direction=[1.0] * 32, amount=1.0)], EXAMPLES)
    with pytest.raises(InputError, match="do not differ"):
        selectivity(scope, interventions, Examples(EXAMPLES.positive, EXAMPLES.positive, EXAMPLES.unrelated))

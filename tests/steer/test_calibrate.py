"""Sizes of layers against plain sums, and the scope that hands them to its interventions."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from qwen_scope.errors import InputError
from qwen_scope.model import LayerStats
from qwen_scope.steer import Decoding, Intervention, calibrate
from qwen_scope.text import Counted

TEXTS = ["The station?", "Guten Morgen! Wo ist der Bahnhof", "a"]


def test_sizes_are_what_plain_sums_say(scope) -> None:
    every = Counted.everything()
    stats = calibrate(
        scope.model, scope.tokenizer, 2, scope.saes[2], TEXTS, sample="three texts", batch=2, counted=every
    )
    rows = []
    for text in TEXTS:
        tokens = scope.tokenize([text])
        rows.append(scope.capture(tokens, [2])[2][0])
    h = torch.cat(rows)
    sae = scope.saes[2]
    pre = (h @ sae.W_enc.T + sae.b_enc).relu()
    top = pre.topk(sae.k)
    dense = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    assert (stats.tokens, stats.documents, stats.sample) == (len(h), 3, "three texts")
    assert stats.norm_median == pytest.approx(float(h.norm(dim=-1).double().quantile(0.5)), rel=1e-5)
    torch.testing.assert_close(torch.tensor(stats.feature_max), dense.amax(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(stats.firing_rate), (dense > 0).float().mean(0))
    assert LayerStats.from_json(json.loads(json.dumps(stats.to_json()))).norm_median == stats.norm_median


def test_a_scope_measures_its_sizes_once(scope) -> None:
    assert scope.stats[2] is scope.stats[2]
    assert scope.stats[1].feature_max is None, "a layer without an SAE still has a residual norm"
    one = Intervention.add(layer=2, feature=17, amount=0.5, unit="resid_norm")
    raw = one.resolve(scope.stats[2], scope.saes[2])
    new = Decoding(max_new_tokens=5)
    assert scope.generate("Once", [one], decoding=new) == scope.generate("Once", [raw], decoding=new)
    several = scope.generate(["Once", "a"], [one], decoding=new)
    assert several[0].text == scope.generate("Once", [one], decoding=new).text
    with pytest.raises(InputError, match="96 does not exist"):
        scope.generate("Once", [Intervention.ablate(layer=0, feature=tiny.D_SAE)], decoding=new)


def test_figures_are_over_the_tokens_that_count(scope) -> None:
    tokens = [scope.tokenize([text]) for text in TEXTS]
    rows = [scope.capture(one, [2])[2][0] for one in tokens]
    limit = float(torch.cat([h[1:] for h in rows]).norm(dim=-1).median())
    special = int(tokens[0].input_ids[0, 1])
    counted = Counted(first=1, special=frozenset({special}), norms={"layers.2.resid_post": limit})
    kept = []
    for one, h in zip(tokens, rows, strict=True):
        for i, token in enumerate(one.input_ids[0].tolist()):
            if i > 0 and token != special and float(h[i].norm()) <= limit:
                kept.append(h[i])
    h, sae = torch.stack(kept), scope.saes[2]
    assert 0 < len(h) < sum(map(len, rows)) - len(rows)
    stats = calibrate(scope.model, scope.tokenizer, 2, sae, TEXTS, batch=2, counted=counted)
    pre = (h @ sae.W_enc.T + sae.b_enc).relu()
    top = pre.topk(sae.k)
    dense = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    assert stats.tokens == len(h)
    assert stats.norm_median == pytest.approx(float(h.norm(dim=-1).double().quantile(0.5)), rel=1e-5)
    torch.testing.assert_close(torch.tensor(stats.feature_max), dense.amax(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(stats.firing_rate), (dense > 0).float().mean(0))
    nothing = Counted(first=1000)
    with pytest.raises(InputError, match=r"no token of three texts counts at layers\.2\.resid_post"):
        calibrate(scope.model, scope.tokenizer, 2, sae, TEXTS, sample="three texts", counted=nothing)


def test_phases_do_not_matter_to_a_sample_that_has_none(scope) -> None:
    some, only = Counted(first=1), Counted(first=1, phases=frozenset({"answer"}))
    one, other = (calibrate(scope.model, scope.tokenizer, 2, None, TEXTS, counted=c) for c in (some, only))
    assert one.to_json() == other.to_json()

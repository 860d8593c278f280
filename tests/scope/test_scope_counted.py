"""Which tokens count in a scope: as was asked for, as the SAEs' files say, else as measured on the built-in sample."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from qwen_scope import load_sae, load_scope
from qwen_scope.cli import main
from qwen_scope.errors import InputError, QwenScopeWarning
from qwen_scope.model import blocks, measure_counted
from qwen_scope.sae import save_sae
from qwen_scope.scope import Scope
from qwen_scope.steer.calibrate import SAMPLE, SAMPLE_NAME
from qwen_scope.text import Counted


def opened(sae: Path | None = None, counted: Counted | None = None) -> Scope:
    return load_scope(tiny.folder() / "model", sae or tiny.folder() / "sae", device="cpu", counted=counted)


def carrying(folder: Path, record: Counted) -> Path:
    """The tiny SAEs, with a record of which tokens counted in their files."""
    for layer in (0, 2):
        sae = load_sae(tiny.folder() / "sae", layer)
        save_sae(replace(sae, meta={**sae.meta, "counted": record.to_json()}), folder, layout="official")
    return folder


def test_it_is_measured_once_on_the_built_in_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    scope = opened()
    counted = scope.counted[0]
    rows = [scope.tokenize([text], truncate=True).input_ids for text in SAMPLE]
    again = measure_counted(scope.model, scope.tokenizer, rows, sample=SAMPLE_NAME)
    assert replace(counted, norms=again.norms) == again
    assert counted.norms.keys() == again.norms.keys()
    for point, norm in again.norms.items():  # padding changes nothing but the last bits
        assert (norm is None and counted.norms[point] is None) or counted.norms[point] == pytest.approx(norm, rel=1e-5)
    assert list(counted.norms) == [f"layers.{layer}.resid_post" for layer in range(scope.n_layers)]
    assert counted.first == 1
    assert counted.special == frozenset(scope.tokenizer.all_special_ids)
    monkeypatch.setattr(scope.model, "forward", None)
    assert scope.counted[2] is counted, "one measurement serves every layer"


def test_thresholds_norms_and_features_are_measured_in_one_pass(tmp_path: Path) -> None:
    """The first steered token waits for it."""
    scope = opened()
    read: list[int] = []
    blocks(scope.model)[0].register_forward_pre_hook(lambda *_: read.append(1))
    assert scope.stats[2].feature_max is not None
    assert len(read) == 1
    assert scope.stats[0].tokens
    assert scope.stats[1].norm_median > 0
    assert len(read) == 1, "thresholds need every layer, so every layer has been read"
    again: list[int] = []
    other = opened(carrying(tmp_path, replace(scope.counted[0], sample="a corpus")))
    blocks(other.model)[0].register_forward_pre_hook(lambda *_: again.append(1))
    assert other.stats[2].feature_max is not None
    assert len(again) == 1, "carried thresholds are checked on the same pass"


def test_what_the_saes_carry_comes_before_a_measurement(tmp_path: Path) -> None:
    special = frozenset(opened().tokenizer.all_special_ids)
    norms = {"layers.0.resid_post": 7.0, "layers.2.resid_post": 9.0}
    record = Counted(first=3, special=special, norms=norms, sample="a corpus", tokens=1000)
    scope = opened(carrying(tmp_path, record))
    assert scope.counted[0] == scope.counted[2] == record
    assert scope.counted[1].sample.endswith(SAMPLE_NAME), "a layer without an SAE is measured"


def test_it_can_be_set_and_figures_follow() -> None:
    scope = opened()
    before = scope.stats[0]
    scope.counted.set(Counted.everything())
    assert scope.counted[0] == scope.counted[1] == Counted.everything()
    every = scope.stats[0]
    assert every.tokens == sum(scope.tokenize(SAMPLE, truncate=True).lengths)
    assert before.tokens <= every.tokens - len(SAMPLE)
    assert opened(counted=Counted.everything()).stats[0].to_json() == every.to_json()
    scope.counted.set(None)
    assert scope.stats[0].to_json() == before.to_json()


def test_a_disagreement_is_said_once(tmp_path: Path) -> None:
    special = frozenset(opened().tokenizer.all_special_ids)
    record = Counted(first=3, special=special)
    folder = carrying(tmp_path / "a", record)
    scope = opened(folder, Counted(first=1, special=special))
    with pytest.warns(QwenScopeWarning, match="first tokens of a row left out: 1 in what was asked for, 3 in"):
        assert scope.counted[0].first == 1
    assert scope.counted[2].first == 1, "warnings are errors here: it is said once"
    assert opened(folder, Counted.everything()).counted[0] == Counted.everything(), "no warning: it was asked for"
    foreign = Counted(first=1, special=frozenset({0, 1}))
    shutil.rmtree(folder)
    scope = opened(carrying(folder, foreign))
    with pytest.warns(QwenScopeWarning, match="which are not the same"):
        assert scope.counted[0] == foreign


@pytest.mark.slow
def test_carried_thresholds_of_another_model_are_said(tmp_path: Path) -> None:
    """SAEs that were trained on a model whose residuals are a hundred times as long, or as short."""
    plain, special = opened(), frozenset(opened().tokenizer.all_special_ids)
    medians = {}
    for layer in (0, 2):
        rows = [plain.capture(plain.tokenize([text], truncate=True), [layer])[layer][0, 1:] for text in SAMPLE]
        medians[layer] = float(np.median(torch.cat(rows).norm(dim=-1).numpy()))
    for name, factor, layers in (("long", 200.0, (0, 2)), ("short", 0.02, (0,)), ("like", 2.5, ())):
        norms = {f"layers.{layer}.resid_post": medians[layer] * factor for layer in (0, 2)}
        scope = opened(carrying(tmp_path / name, Counted(1, special, norms)))
        for layer in layers:
            at = f"layers.{layer}.resid_post"
            said = f"the threshold for sinks at {at} is {norms[at]:.4g} in the files of the SAEs, and residuals of this"
            with pytest.warns(QwenScopeWarning, match=re.escape(said) + f".* of about {medians[layer]:.4g}"):
                scope.counted.check_sample([layer])
        scope.counted.check_sample([0] if name == "short" else [0, 2])  # warnings are errors here: it is said once
    with pytest.warns(QwenScopeWarning, match="at layer 0 are longer than the threshold for sinks in the files of the"):
        opened(tmp_path / "short").features(TEXTS, [0])
    opened(tmp_path / "long").features(TEXTS, [0])
    everything = opened(tmp_path / "short", Counted.everything())
    everything.counted.check_sample([0])
    assert everything.features(TEXTS, [0]).tally(0)["sink"] == 0


def test_a_scope_counts_by_what_is_given_with_the_texts() -> None:
    scope, counted = opened(), Counted(first=2)
    seen = scope.features(TEXTS[:2], [0], counted=counted)
    assert seen.tally(0)["first"] == 4
    assert seen.tally(0)["sink"] == seen.tally(0)["special"] == 0
    assert scope.features(TEXTS[:2], [0]).tally(0)["first"] == 2


@pytest.mark.slow
def test_a_hook_point_within_a_block_gets_a_threshold_of_its_own(tmp_path: Path) -> None:
    for layer in (0, 2):
        within = replace(load_sae(tiny.folder() / "sae", layer), hook_point=f"layers.{layer}.mlp_out")
        save_sae(within, tmp_path, layout="official")
    scope = opened(tmp_path)
    first, both = scope.counted[0].norms, scope.counted[2].norms
    assert both.keys() - first.keys() == {"layers.2.mlp_out"}
    assert {at: both[at] for at in first} == first


TEXTS = ["The station is fine today", "Guten Morgen, the weather", "a"]


def kept_by_hand(scope: Scope, text: str, counted: Counted, layer: int) -> list[bool]:
    tokens = scope.tokenize([text])
    h = scope.capture(tokens, [layer])[layer][0]
    limit = counted.norms[f"layers.{layer}.resid_post"]
    assert limit is not None
    ids = tokens.input_ids[0].tolist()
    return [
        i >= counted.first and one not in counted.special and float(h[i].norm()) <= limit for i, one in enumerate(ids)
    ]


def test_tokens_that_do_not_count_are_shown_but_neither_rank_nor_compare() -> None:
    scope = opened(counted=Counted.everything())
    tokens = scope.tokenize(TEXTS)
    h = scope.capture(tokens, [0])[0]
    limit = float(h[:2, 3:5].norm(dim=-1).quantile(0.6))
    counted = Counted(1, frozenset({int(tokens.input_ids[0, 2])}), {"layers.0.resid_post": limit})
    every = scope.features(TEXTS, [0])
    scope.counted.set(counted)
    seen = scope.features(TEXTS, [0])
    assert torch.equal(seen.acts[0].indices, every.acts[0].indices)
    assert torch.equal(seen.acts[0].values, every.acts[0].values)
    kept = [kept_by_hand(scope, text, counted, 0) for text in TEXTS]
    assert [seen.counts(i, 0).tolist() for i in range(3)] == kept
    assert seen.left_out(0, 0)[0] == "first"
    assert seen.left_out(0, 0)[2] == "special"
    assert "sink" in {*seen.left_out(0, 0), *seen.left_out(1, 0)}
    assert sum(n for why, n in seen.tally(0).items() if why not in ("counts", "padding")) == sum(
        not one for row in kept for one in row
    )
    dense = seen.of(1, 0).to_dense()
    found = seen.strongest(1, 0)
    top = dense[kept[1]].amax(0)
    assert [one.feature for one in found] == sorted(top.nonzero().flatten().tolist(), key=lambda f: (-float(top[f]), f))
    for one in found:
        assert kept[1][one.position]
        assert one.rate == pytest.approx(float((dense[kept[1]][:, one.feature] > 0).double().mean()))
        assert one.mean == pytest.approx(float(dense[kept[1]][:, one.feature].mean()), rel=1e-5)
    assert seen.strongest(2, 0) == [], "no token of a text of one token counts"
    a, b = ((seen.of(i, 0).to_dense()[kept[i]] > 0).double().mean(0) for i in (0, 1))
    for one in scope.compare(TEXTS[0], TEXTS[1], [0], n=None)[0]:
        assert one.rate_a == pytest.approx(float(a[one.feature]))
        assert one.rate_b == pytest.approx(float(b[one.feature]))
    with pytest.raises(InputError, match="or count all"):
        scope.compare("a", "a", [0])


@pytest.mark.slow
def test_the_commands_mark_what_does_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu")
    assert main(["features", TEXTS[0], *where, "--layers", "0"]) == 0
    out = capsys.readouterr().out
    assert "left out: 1 first token" in out
    assert main(["features", TEXTS[0], *where, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["tokens"][0]["left_out"] == {"0": "first", "2": "first"}
    assert main(["features", TEXTS[0], *where, "--layers", "0", "--count", "all"]) == 0
    assert "left out" not in capsys.readouterr().out
    for extra, first in ((), 2), (("--count", "all"), 0):
        assert main(["compare", *TEXTS[:2], *where, "--json", *extra]) == 0
        assert json.loads(capsys.readouterr().out)["left_out"]["0"]["first"] == first

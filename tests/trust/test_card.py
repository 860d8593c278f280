"""The feature card: what it gathers, measures and keeps, and the word it ends with."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lab_store
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from qwen_scope import FeatureStore
from qwen_scope.cli import main
from qwen_scope.errors import InputError, MismatchError, NotFoundError, QwenScopeWarning
from qwen_scope.features import (
    Label,
    Notes,
    TokenJudge,
    common_firings,
    label_features,
    material,
    scored_label,
)
from qwen_scope.sae import parse_feature
from qwen_scope.stats import Interval
from qwen_scope.store import FeatureSummary
from qwen_scope.trust import (
    CardOptions,
    Concept,
    ConceptFit,
    Other,
    Push,
    Sibling,
    TrustEvidence,
    card,
    card_html,
    clarity,
    concept_fit,
    faithfulness,
    interp_card,
    kin,
    purity,
    push,
    responsiveness,
    sibling,
    trust,
)
from qwen_scope.trust.push import controls

LAYER, OTHER = lab_store.LAYER, lab_store.OTHER
GERMAN = Concept("language", "de")


@pytest.fixture
def own(tmp_path: Path):
    """A store that may be written into."""
    with FeatureStore(lab_store.copied(tmp_path)) as opened:
        yield opened


def detector(store: FeatureStore) -> int:
    """The feature of the layer that tells German documents best, by brute force."""
    table = store.firing("max", [LAYER])
    dense = np.zeros((store.manifest.documents, store.layer(LAYER).d_sae))
    dense[table["document"].to_numpy(), table["feature"].to_numpy()] = table["value"].to_numpy()
    here = np.zeros(len(dense), bool)
    here[store.where(("language", "de", True))] = True
    apart = (dense[here] > 0).mean(0) - (dense[~here] > 0).mean(0)
    return int(apart.argmax())


# --- FADE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_fade_is_gini_and_average_precision(seed: int) -> None:
    """As its own package computes them: the sign is turned where the feature falls silent on the concept."""
    rng = np.random.default_rng(seed)
    concept = np.maximum(rng.normal(0.5 if seed % 2 else -0.5, 1, 40).round(1), 0)
    others = np.maximum(rng.normal(0, 1, 70).round(1), 0)
    y, values = np.repeat([1, 0], [40, 70]), np.concatenate([concept, others])
    gini = 2 * roc_auc_score(y, values) - 1
    assert responsiveness(concept, others) == clarity(concept, others) == pytest.approx(abs(gini))
    assert purity(concept, others) == pytest.approx(average_precision_score(y, values if gini >= 0 else -values))


@pytest.mark.parametrize(
    ("shares", "unsteered", "value"), [([0.2, 0.8], 0.2, 0.75), ([0.1], 0.4, 0.0), ([1.0], 0.0, 1.0), ([1.0], 1.0, 0.0)]
)
def test_faithfulness_is_the_share_of_what_could_be_gained(shares: list, unsteered: float, value: float) -> None:
    assert faithfulness(shares, unsteered) == pytest.approx(value)
    with pytest.raises(InputError, match="between 0 and 1"):
        faithfulness([1.2], 0.5)


def test_a_concept_is_measured_by_documents(store: FeatureStore) -> None:
    feature = detector(store)
    found = concept_fit(store, LAYER, feature, GERMAN)
    table = store.sql("SELECT document, max(value) AS v FROM activations WHERE layer = ? AND feature = ? GROUP BY 1",
                      [LAYER, feature])  # fmt: skip
    values = np.zeros(store.manifest.documents)
    values[table["document"].to_numpy()] = table["v"].to_numpy()
    y = np.zeros(len(values), bool)
    y[[i for i, m in enumerate(store.sql("SELECT meta FROM documents ORDER BY document")["meta"].to_pylist())
       if json.loads(m).get("language") == "de"]] = True  # fmt: skip
    assert (found.documents, found.others) == (y.sum(), (~y).sum())
    assert found.auroc.estimate == pytest.approx(roc_auc_score(y, values))
    assert found.purity == pytest.approx(average_precision_score(y, values))
    assert found.other in ("language=en", "language=zh")
    assert ConceptFit.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(NotFoundError, match="has a column 'tongue'"):
        concept_fit(store, LAYER, feature, Concept("tongue", "de"))
    with pytest.raises(InputError, match=r"0 documents .* have language=xx") as said:
        concept_fit(store, LAYER, feature, Concept("language", "xx"))
    assert "\n" not in str(said.value)


# --- the rules ----------------------------------------------------------------------------------------------------


def interval(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, 20)


FIRES = FeatureSummary(3, 7, 500, 60, 0.02, 0.3, 0.1, 2.0, 9.0, 0.1)
GOOD = Label("German", interval(0.8, 0.95), interval(0.7, 0.9), "m", "m")
BAD = replace(GOOD, detection=interval(0.45, 0.6))
FIT = ConceptFit("language=de", 40, 80, interval(0.95, 1.0), 0.95, 0.9, "language=en", interval(0.3, 0.5))
MOVES = Push("language=de", 1.0, 20, interval(0.5, 0.9), interval(-0.9, -0.4), interval(-0.2, 0.1), interval(-1, -0.5),
             ((1.0, 0.7),), tuple([0.1] * 19))  # fmt: skip
THERE = Sibling("b", "f", 3, 0.9, True, 0.4, 0.7)
GONE = replace(THERE, cosine=0.3)
WHOLE = TrustEvidence(FIRES, GOOD, BAD, FIT, None, MOVES, (THERE, GONE))


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, "solid"),
        ({"siblings": ()}, "solid"),
        ({"concept": None}, "solid"),
        ({"concept": None, "control": None}, "usable"),
        ({"outcome": "causal", "push": None}, "solid"),
        ({"outcome": "correlated only"}, "usable"),
        ({"outcome": "causal, but breaks fluency"}, "usable"),
        ({"outcome": "no effect"}, "shaky"),
        ({"outcome": "entangled"}, "shaky"),
        ({"push": None}, "usable"),
        ({"push": replace(MOVES, randoms=(*[0.1] * 18, 0.8))}, "usable"),
        ({"push": replace(MOVES, effect=interval(-0.1, 0.3))}, "usable"),
        ({"push": replace(MOVES, opposite=interval(0.4, 0.9))}, "usable"),
        ({"siblings": (THERE, GONE, GONE)}, "usable"),
        ({"siblings": (GONE, GONE)}, "shaky"),
        ({"summary": replace(FIRES, frequency=0.4)}, "usable"),
        ({"summary": replace(FIRES, documents=3)}, "unknown"),
        ({"summary": None}, "unknown"),
        ({"label": None, "control": None, "concept": None}, "unknown"),
        ({"concept": replace(FIT, auroc=interval(0.45, 0.6))}, "shaky"),
        ({"concept": replace(FIT, auroc_of_other=interval(0.9, 0.99))}, "shaky"),
        ({"concept": replace(FIT, purity=0.2)}, "usable"),
        ({"concept": None, "label": BAD}, "shaky"),
        ({"concept": None, "control": GOOD}, "shaky"),
    ],
)
def test_the_word_follows_the_rules(changed: dict[str, Any], word: str) -> None:
    found = trust(replace(WHOLE, **changed))
    assert found.word == word
    assert len(found.reasons) == 8
    assert all(rule and held in (True, False, None) for rule, held in found.reasons)


# --- single measurements ------------------------------------------------------------------------------------------


def test_parts_and_absorbers_are_those_of_brute_force(store: FeatureStore) -> None:
    sae = lab_store.scope().saes[LAYER]
    on = common_firings(store, LAYER, store, LAYER)[0].to_dense().numpy() > 0
    n = on.sum(0)
    unit = sae.W_dec.float().numpy() / np.linalg.norm(sae.W_dec.float().numpy(), axis=0)
    feature = int(n.argmax())
    parts, absorbers = kin(store, LAYER, feature, sae, 2048)
    within = (on & on[:, [feature]]).sum(0) / np.maximum(n, 1)
    known = (n >= 10) & (np.arange(len(n)) != feature)
    assert {one.feature for one in parts} == set(np.flatnonzero(known & (within >= 0.9) & (n < n[feature])).tolist())
    cosine = unit.T @ unit[:, feature]
    assert {one.feature for one in absorbers} == set(np.flatnonzero(known & (within <= 0.1) & (cosine >= 0.3)).tolist())
    assert all(one.cosine == pytest.approx(cosine[one.feature], abs=1e-5) for one in (*parts, *absorbers))
    assert len(parts) > 3


def test_the_same_dictionary_has_the_feature(store: FeatureStore) -> None:
    sae = lab_store.scope().saes[LAYER]
    found = sibling("itself", sae, 678, sae, stores=(store, LAYER, store, LAYER))
    assert (found.partner, found.cofires_with, found.mutual, found.found) == (678, 678, True, True)
    assert found.cosine == pytest.approx(1)
    assert found.jaccard == 1
    torch.manual_seed(0)
    other = replace(sae, W_dec=torch.randn_like(sae.W_dec.float()))  # type: ignore[type-var]
    gone = sibling("random", sae, 678, other)
    assert not gone.found
    assert Sibling.from_json(json.loads(json.dumps(gone.to_json()))) == gone
    narrow = replace(sae, W_enc=sae.W_enc[:, :8], W_dec=sae.W_dec[:8], b_dec=sae.b_dec[:8])  # type: ignore[type-var]
    with pytest.raises(MismatchError, match="different spaces"):
        sibling("narrow", sae, 678, narrow)


def test_the_effect_on_likelihood_is_that_of_a_hook_of_ones_own(store: FeatureStore) -> None:
    scope, feature = lab_store.scope(), detector(store)
    found = push(scope, store, LAYER, feature, GERMAN, texts=4, tokens=24, randoms=3)
    rng = np.random.default_rng((0, LAYER, feature))
    has = np.zeros(store.manifest.documents, bool)
    has[store.where(("language", "de", True))] = True
    chosen = [rng.permutation(np.flatnonzero(which))[:4] for which in (has, ~has)]
    direction = scope.saes[LAYER].W_dec[:, feature].float()
    change = direction / direction.norm() * scope.stats[LAYER].norm_median

    def scored(amount: float) -> list[list[float]]:
        block = scope.model.model.layers[LAYER]
        hook = block.register_forward_hook(lambda _, __, out: out + amount * change)
        try:
            return [[_mean(store, scope.model, int(document)) for document in side] for side in chosen]
        finally:
            hook.remove()

    plain, moved, turned = scored(0.0), scored(1.0), scored(-1.0)
    for measured, done in ((found.effect, moved), (found.opposite, turned)):
        gained = [np.mean(np.subtract(after, before)) for after, before in zip(done, plain, strict=True)]
        assert measured.estimate == pytest.approx(gained[0] - gained[1], abs=1e-3)
    assert len(found.randoms) == 3
    assert dict(found.doses)[1.0] == pytest.approx(found.effect.estimate)
    assert Push.from_json(json.loads(json.dumps(found.to_json()))) == found


def _mean(store: FeatureStore, model: Any, document: int) -> float:
    """The mean log-probability of a document's first 24 tokens, each from those before it."""
    query = "SELECT token FROM tokens WHERE document = ? AND position < 24 ORDER BY position"
    ids = torch.tensor([store.sql(query, [document])["token"].to_pylist()])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return float(logits.gather(1, ids[0, 1:, None]).mean())


def test_controls_are_not_of_the_concept(store: FeatureStore) -> None:
    feature, sae = detector(store), lab_store.scope().saes[LAYER]
    has = np.zeros(store.manifest.documents, bool)
    has[store.where(("language", "de", True))] = True
    some = controls(store, LAYER, feature, has, sae.W_dec, 19, np.random.default_rng(0))
    assert len(set(some)) == 19
    assert feature not in some
    on = common_firings(store, LAYER, store, LAYER)[0].to_dense().numpy() > 0
    of = store.sql("SELECT document FROM tokens ORDER BY document, position")["document"].to_numpy()
    for one in some:
        assert on[has[of], one].mean() <= 2 * on[~has[of], one].mean()
    with pytest.raises(InputError, match="features to compare with"):
        controls(store, LAYER, feature, has, sae.W_dec, 5000, np.random.default_rng(0))


# --- the card as a whole ------------------------------------------------------------------------------------------


def forbid(monkeypatch: pytest.MonkeyPatch, where: str, *names: str) -> None:
    """From now on nothing may be measured by these functions of a file."""
    for name in names:
        monkeypatch.setattr(sys.modules[f"qwen_scope.{where}"], name, lambda *_, **__: pytest.fail("measured twice"))


def test_a_card_gathers_and_measures_nothing_twice(own: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    scope, feature = lab_store.scope(), detector(own)
    frequent = [f for f in range(60) if own.feature(LAYER, f).documents in range(15, 50)][:3]
    label_features(own, [(LAYER, f) for f in (feature, *frequent)], TokenJudge())
    others = [Other("layer 2", scope.saes[OTHER], own, OTHER)]
    asked: dict[str, Any] = {"store": own, "scope": scope, "concept": GERMAN, "others": others}
    first = card(LAYER, feature, options=CardOptions(n=3, effect=True), **asked)
    plain = json.loads(json.dumps(first.to_json()))
    assert plain["verdict"] == first.trust.word
    assert plain["identity"]["fingerprint"] == scope.saes[LAYER].identity.fingerprint
    assert plain["identity"]["kind"] == "base"
    assert first.concept is not None
    assert first.concept.auroc.estimate > 0.9
    assert first.siblings[0].cofires_with is not None
    assert first.judged is not None
    assert first.judged.clarity is not None
    assert not any("clarity" in one for one in first.missing)
    assert any("faithfulness" in one for one in first.missing)
    assert not any("--effect" in one for one in first.missing)
    assert first.page.label is not None
    assert first.control is not None
    of = Notes(own).labels()[parse_feature(first.control.of)]
    assert of.text != first.page.label.text
    assert first.control.label == scored_label(material(own, LAYER, feature), TokenJudge(), of.text)

    forbid(monkeypatch, "trust.card", "concept_fit", "kin", "halves")
    forbid(monkeypatch, "trust.gather", "push", "sibling", "scored_label", "judged")
    forbid(monkeypatch, "features.record", "cofiring", "elsewhere")
    with FeatureStore(own.folder) as opened:
        second = card(LAYER, feature, options=CardOptions(n=3), **asked | {"store": opened})
    assert json.loads(json.dumps(second.to_json())) == plain | {"store": str(own.folder)}


def test_the_page_opens_by_itself_and_escapes_what_comes_from_outside(own: FeatureStore) -> None:
    Notes(own).write(LAYER, 678, "<script>alert(1)</script>")
    text = card_html(card(LAYER, 678, store=own, options=CardOptions(n=2)))
    assert text.startswith("<!doctype html>")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search("src=|href=|url", text)
    for said in ("Verdict: unknown", "Why this word", "Not measured", "Strongest contexts", "Identity"):
        assert said in text


SCHEMA = Path(__file__).parents[1] / "oracles" / "interp_card.schema.json"


def test_an_interpretation_card_is_of_the_published_shape(own: FeatureStore) -> None:
    from jsonschema import Draft202012Validator, FormatChecker

    feature = next(f for f in range(40) if own.feature(LAYER, f).documents > 20)
    with pytest.raises(InputError, match="qwen-scope label STORE"):
        interp_card(card(LAYER, feature, store=own))
    label_features(own, [(LAYER, feature)], TokenJudge())
    others = [Other("itself", lab_store.scope().saes[LAYER])]
    made = interp_card(card(LAYER, feature, store=own, scope=lab_store.scope(), others=others))
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    check = Draft202012Validator(schema, format_checker=FormatChecker())
    assert list(check.iter_errors(json.loads(json.dumps(made)))) == []
    assert list(check.iter_errors({**made, "replication_status": "often"}))
    assert made["replication_status"] == "single"
    strongest = made["top_activating_contexts"][0]
    at = own.contexts(LAYER, feature, 1, per_document=True)[0]
    assert strongest["text"] == at.text
    assert at.tokens[strongest["token_position"]] == at.tokens[at.position - at.start]


def test_a_store_that_can_t_be_written_still_has_a_card(own: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise InputError("no room to write notes.jsonl")

    monkeypatch.setattr("qwen_scope.features.notes.append_lines", full)
    with pytest.warns(QwenScopeWarning, match="is not kept: no room"):
        found = card(LAYER, 678, store=own, concept=GERMAN, options=CardOptions(n=2))
    assert found.concept is not None


def test_measurements_are_kept_merged_and_exported(own: FeatureStore, tmp_path: Path) -> None:
    notes = Notes(own)
    notes.learn(LAYER, 3, "x", {"a": 1})
    notes.learn(LAYER, 3, "x", {"a": 1})
    assert len(notes) == 1
    notes.learn(LAYER, 3, "x", {"a": 2})
    assert Notes(own).known(LAYER, 3, "x") == {"name": "x", "a": 2}
    assert Notes(own).known(LAYER, 4, "x") is None
    assert notes.export(tmp_path / "notes.jsonl") == 2
    (own.folder / "notes.jsonl").unlink()
    assert Notes(own).merge(tmp_path / "notes.jsonl") == 2


def test_what_another_version_wrote_in_another_shape_is_measured_anew(own: FeatureStore) -> None:
    """Each measurement that a card reads, with a field missing and with one too many."""
    feature = detector(own)
    label_features(own, [(LAYER, feature)], TokenJudge())
    asked: dict[str, Any] = {"scope": lab_store.scope(), "concept": GERMAN, "options": CardOptions(n=2)}
    asked["others"] = [Other("layer 2", lab_store.scope().saes[OTHER])]
    first = card(LAYER, feature, store=own, **asked).to_json()
    names = [one["name"] for one in Notes(own).measured(LAYER, feature)]
    assert len(names) == 7
    for body in ({"x": 1}, {}):
        for name in [*names, "find x"]:
            Notes(own).learn(LAYER, feature, name, body)
        again = card(LAYER, feature, store=own, **asked).to_json()
        assert {k: v for k, v in again.items() if k != "notes"} == {k: v for k, v in first.items() if k != "notes"}


def test_a_measurement_on_other_documents_is_not_taken_for_one_s_own(own: FeatureStore, tmp_path: Path) -> None:
    """Two stores of one SAE may be merged; a density or an AUROC of the one says nothing about the other."""
    from qwen_scope.scope import ExtractOptions, extract
    from qwen_scope.text import Corpus

    Notes(own).learn(LAYER, 3, "x", {"a": 1})
    Notes(own).export(tmp_path / "notes.jsonl")
    scope = lab_store.scope()
    rows = Corpus([{"text": "Guten Morgen, Anna."}], name="x")
    extract(rows, scope.loaded, {LAYER: scope.saes[LAYER]}, tmp_path / "b", ExtractOptions()).close()
    with FeatureStore(tmp_path / "b") as other:
        assert Notes(other).merge(tmp_path / "notes.jsonl") == 1
        assert Notes(other).known(LAYER, 3, "x") is None


def test_the_command(own: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, out = f"{LAYER}/{detector(own)}", tmp_path / "card.html"
    words = ["card", str(own.folder), place, "--concept", "language=de", "--other", f"lab@{OTHER}", "-n", "2"]
    assert main([*words, "--html", str(out), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["verdict"] in ("solid", "usable", "shaky", "unknown")
    assert plain["siblings"][0]["name"].endswith(f"layer {OTHER}")
    assert plain["verdict"] in out.read_text(encoding="utf-8")
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "The concept: 16 documents with it" in said
    assert "Not measured" in said


def test_show_and_find_write_into_the_card(own: FeatureStore, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        main(["find", str(own.folder), "--positive", "language=de", "--layers", str(LAYER), "-n", "1", "--json"]) == 0
    )
    (best,) = json.loads(capsys.readouterr().out)["found"]
    place = f"{LAYER}/{best['feature']}"
    assert main(["show", str(own.folder), "--feature", place, "-n", "3", "--json"]) == 0
    page = json.loads(capsys.readouterr().out)
    forbid(monkeypatch, "features.record", "cofiring", "elsewhere")
    assert main(["card", str(own.folder), place, "-n", "3", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["cofiring"] == page["cofiring"]
    assert plain["elsewhere"] == page["elsewhere"]
    (found,) = plain["findings"]
    assert found == {"name": "find language=de", "against": "all others", "f1": best["f1"], "auroc": best["auroc"],
                     "q": best["q"]}  # fmt: skip
    assert main(["card", str(own.folder), place, "-n", "3"]) == 0
    assert "Found by find" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["3/1"], "has no layer 3; it has layers 2, 5"),
        (["5/99999"], "layer 5 has features 0 to 2047, not 99999"),
        (["5"], "LAYER/FEATURE"),
        (["5/1", "--concept", "de"], "--concept is COLUMN=VALUE"),
        (["5/1", "--no-model", "--concept", "tongue=de"], "has a column 'tongue'"),
        (["5/1", "--no-model", "--effect", "--concept", "language=de"], "measured with a model and a concept"),
        (["5/1", "--no-model", "--interp", "x.json"], "has no label"),
        (["5/1", "--other", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], says: str, folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = lab_store.copied(tmp_path)
    assert main(["card", str(store), *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert says in said[-1]
    assert not (tmp_path / "x.json").exists()

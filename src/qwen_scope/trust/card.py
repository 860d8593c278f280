"""The feature card: everything known of a feature, what was not measured, and how far to trust it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from qwen_scope.errors import InputError
from qwen_scope.features import (
    FeaturePage,
    Judge,
    Label,
    LabelOptions,
    Lens,
    Notes,
    TokenJudge,
    feature_page,
    material,
    remembered_findings,
    scored_label,
    with_neighbours,
)
from qwen_scope.sae import SAE, catalog
from qwen_scope.scope import Scope
from qwen_scope.stats import Interval
from qwen_scope.store import FeatureStore

from .concept import Concept, ConceptFit, concept_fit
from .fade import faithfulness
from .kin import Kin, kin
from .options import CardOptions
from .push import Push, push
from .rules import Trust, TrustEvidence, TrustRules, trust
from .siblings import Sibling, sibling


@dataclass(frozen=True, eq=False)
class Other:
    """Another dictionary to look for the feature in.

    Attributes:
        name: shown.   sae: its weights.
        store, layer: a store of the same documents that was made with it, for co-firing.
    """

    name: str
    sae: SAE
    store: FeatureStore | None = None
    layer: int | None = None


@dataclass(frozen=True)
class Control:
    """The scores of another feature's label on the same contexts; `of` names that feature."""

    of: str
    label: Label


@dataclass(frozen=True, eq=False)
class Card:
    """One feature, with a word on how far to trust it.

    Attributes:
        page: contexts, activations, tokens it promotes, neighbours, label, notes and the newest verdict.
        identity: which SAE and model: group, fingerprint, layer, hook point, d_sae, k, architecture, model, and whether
            that is a base or an instruct model (None where the catalog does not list the group).
        phases: tokens it fires on by phase of a conversation; empty where the store tells none.
        control: its label's scores beside those of another label.
        concept: how well it goes with a column of the metadata; responsiveness and purity (FADE).
        faithfulness: as FADE defines it, of the shares that `validate` recorded; None without a verdict.
        push: whether adding it makes documents of the concept likelier.
        findings: what `find` learnt of it in this store, each with the documents that it tells from others.
        siblings: the feature in other dictionaries.
        parts, absorbers: features of its own dictionary that may share out what it stands for.
        failures: what is known to be wrong, in sentences.
        missing: what was not measured, each with how to measure it.
        trust: the word and its rules.
    """

    page: FeaturePage
    identity: Mapping[str, Any]
    phases: Mapping[str, int]
    control: Control | None
    concept: ConceptFit | None
    faithfulness: float | None
    push: Push | None
    findings: tuple[Mapping[str, Any], ...]
    siblings: tuple[Sibling, ...]
    parts: tuple[Kin, ...]
    absorbers: tuple[Kin, ...]
    failures: tuple[str, ...]
    missing: tuple[str, ...]
    trust: Trust

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        control = None if self.control is None else {"of": self.control.of, **asdict(self.control.label)}
        return {
            **self.trust.to_json(),
            "identity": dict(self.identity),
            **self.page.to_json(),
            "causal": self.page.verdict,
            "verdict": self.trust.word,
            "phases": dict(self.phases),
            "control_label": control,
            "concept": None if self.concept is None else self.concept.to_json(),
            "faithfulness": self.faithfulness,
            "effect_on_likelihood": None if self.push is None else self.push.to_json(),
            "findings": [dict(one) for one in self.findings],
            "siblings": [one.to_json() for one in self.siblings],
            "parts": [asdict(one) for one in self.parts],
            "absorbers": [asdict(one) for one in self.absorbers],
            "failures": list(self.failures),
            "not_measured": list(self.missing),
        }


def card(
    layer: int,
    feature: int,
    *,
    store: FeatureStore,
    scope: Scope | None = None,
    concept: Concept | None = None,
    others: Sequence[Other] = (),
    lens: Lens | None = None,
    judge: Judge | None = None,
    options: CardOptions | None = None,
    rules: TrustRules | None = None,
) -> Card:
    """Gather what is known of a feature, measure what is missing, and say what was not measured.

    What is measured goes into the store's record (`Notes`), beside labels and verdicts, and is not measured twice.

    Args:
        scope: the model with the SAEs that the store was made with: for tokens, directions and `options.effect`.
        concept: a column and a value of the documents' metadata that the feature is taken to stand for.
        others: dictionaries to look for the feature in.
        judge: whoever scored the label, to score another label on the same contexts; for a list of typical tokens that
            is the rule that made it.

    Raises:
        NotFoundError: no such layer, feature or column.   MismatchError: the store was made with another SAE, or a
        dictionary reads residuals of another width.   InputError: too few documents with the concept or without, or
        `effect` without a scope and a concept.
    """
    o = options or CardOptions()
    if o.effect and (scope is None or concept is None):
        raise InputError("the effect is measured with a model and a concept; name both, such as concept language=de")
    plain = feature_page(
        layer, feature, store=store, scope=scope, n=o.n, contexts=o.n, seed=o.seed, with_cofiring=False, lens=lens
    )
    record = _Record(Notes(store), layer, feature, o.again)
    page = with_neighbours(plain, store, scope, o.n, again=o.again)
    control = _control(record, page, store, judge, o.seed)
    fit = None
    if concept is not None:
        measured = record.get(
            f"concept {concept}", lambda: concept_fit(store, layer, feature, concept, o.seed).to_json()
        )
        fit = ConceptFit.from_json(measured)
    pushed = _pushed(record, store, scope, layer, feature, concept, o)
    sae = None if scope is None else scope.saes[layer]
    siblings = tuple(_sibling(record, store, layer, feature, sae, one) for one in others)
    parts, absorbers = kin(store, layer, feature, sae, o.n)
    outcome = None if page.verdict is None else str(page.verdict.get("outcome"))
    held = TrustEvidence(page.summary, page.label, control.label if control else None, fit, outcome, pushed, siblings)
    return Card(
        page, _identity(store, layer), store.phase_counts(layer, feature), control, fit, _faithfulness(page.verdict),
        pushed, remembered_findings(store, layer, feature), siblings, parts, absorbers,
        _failures(page, rules or TrustRules()),
        _missing(page, control, fit, pushed, siblings, scope, lens), trust(held, rules),
    )  # fmt: skip


@dataclass(frozen=True)
class _Record:
    """The store's record of one feature: asks it first, and keeps what had to be measured."""

    notes: Notes
    layer: int
    feature: int
    again: bool

    def get(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        known = None if self.again else self.notes.known(self.layer, self.feature, name)
        if known is None:
            known = dict(measure())
            self.notes.learn(self.layer, self.feature, name, known)
        return known


def _control(record: _Record, page: FeaturePage, store: FeatureStore, judge: Judge | None, seed: int) -> Control | None:
    """Another label of the same judge on the contexts that test this one; None where there is none to score."""
    label = page.label
    judge = judge or TokenJudge()
    if label is None or label.scorer != judge.scorer:
        return None
    labels = record.notes.labels()
    place = (page.layer, page.feature)
    fitting = sorted(
        p for p, one in labels.items() if p != place and one.text != label.text and one.scorer == judge.scorer
    )
    if not fitting:
        return None
    chosen = fitting[int(np.random.default_rng((seed, *place)).integers(len(fitting)))]
    name = f"control of {label.text!r}, seed {seed}"

    def measure() -> dict[str, Any]:
        drawn = material(store, *place, LabelOptions(seed=seed))
        return {"of": f"{chosen[0]}/{chosen[1]}", "label": asdict(scored_label(drawn, judge, labels[chosen].text))}

    try:
        found = record.get(name, measure)
    except InputError:  # too few contexts are left to test with
        return None
    scores = {part: Interval(**found["label"][part]) for part in ("detection", "fuzzing")}
    return Control(found["of"], Label(**{**found["label"], **scores}))


def _pushed(
    record: _Record,
    store: FeatureStore,
    scope: Scope | None,
    layer: int,
    feature: int,
    concept: Concept | None,
    o: CardOptions,
) -> Push | None:
    """The test by likelihood: from the record, or measured where that was asked for."""
    if concept is None:
        return None
    name = f"effect on {concept}"
    if not o.effect or scope is None:
        known = record.notes.known(layer, feature, name)
        return None if known is None else Push.from_json(known)
    found = record.get(name, lambda: push(scope, store, layer, feature, concept, texts=o.texts, seed=o.seed).to_json())
    return Push.from_json(found)


def _sibling(record: _Record, store: FeatureStore, layer: int, feature: int, mine: SAE | None, other: Other) -> Sibling:
    if mine is None:
        raise InputError("looking for a feature in another dictionary takes the SAE of its own; leave no_model out")
    both = None if other.store is None or other.layer is None else (store, layer, other.store, other.layer)
    name = f"sibling {other.sae.identity.fingerprint[:16]}{'' if both is None else ' with firing'}"
    found = record.get(name, lambda: sibling(other.name, mine, feature, other.sae, stores=both).to_json())
    return replace(Sibling.from_json(found), name=other.name)


def _identity(store: FeatureStore, layer: int) -> dict[str, Any]:
    info = store.layer(layer)
    listed = catalog.lookup(info.group)
    return {
        "group": info.group,
        "fingerprint": info.fingerprint,
        "layer": layer,
        "hook_point": info.hook_point,
        "d_sae": info.d_sae,
        "k": info.k,
        "architecture": info.architecture,
        "model": store.manifest.model,
        "kind": None if listed is None else listed.kind,
        "documents": store.manifest.documents,
        "tokens": info.tokens,
    }


def _faithfulness(verdict: Mapping[str, Any] | None) -> float | None:
    """FADE's faithfulness of what `validate` recorded, where its target is a share."""
    found = {one["name"]: one["effect"]["estimate"] for one in (verdict or {}).get("conditions", ())}
    shares = [found.get("this feature"), found.get("unsteered")]
    if None in shares or not all(0 <= float(one) <= 1 for one in shares if one is not None):
        return None
    return faithfulness([float(shares[0])], float(shares[1]))  # type: ignore[arg-type]


def _failures(page: FeaturePage, rules: TrustRules) -> tuple[str, ...]:
    """What is known to be wrong with a feature."""
    s, out = page.summary, []
    if s is not None and not s.tokens:
        out.append("it never fires in this store")
    elif s is not None:
        if s.documents < rules.documents:
            out.append(f"it fires in {s.documents} documents alone")
        if s.frequency > rules.dense:
            out.append(f"it is dense: it fires on {s.frequency:.0%} of the tokens")
        first = sum(one.position <= 1 for one in page.strongest)
        if page.strongest and first > len(page.strongest) / 2:
            out.append("most of its strongest contexts are at the first two tokens of a document")
    if page.label is not None and page.label.at_chance:
        out.append("its label is at chance")
    twins = [one.feature for one in page.similar if (one.cosine or 0) >= 0.9]
    if twins:
        out.append(f"its direction has twins in the same dictionary: {', '.join(map(str, twins))}")
    if page.verdict is not None and page.verdict.get("outcome") != "causal":
        out.append(f"validate: {page.verdict.get('outcome')}")
    return tuple(out)


def _missing(
    page: FeaturePage,
    control: Control | None,
    fit: ConceptFit | None,
    pushed: Push | None,
    siblings: Sequence[Sibling],
    scope: Scope | None,
    lens: Lens | None,
) -> tuple[str, ...]:
    """What was not measured, each with the way to do so."""
    known = {
        "a label: qwen-scope label STORE --features LAYER/FEATURE": page.label is not None,
        "another label on the same contexts: label more features, and name the judge that scored this one":
            page.label is None or control is not None,
        "responsiveness and purity (FADE): --concept COLUMN=VALUE": fit is not None,
        "clarity (FADE): it takes texts written for the concept, by a judge model": False,
        "faithfulness (FADE), dose and side effects: qwen-scope validate, kept with qwen-scope label --verdict":
            page.verdict is not None,
        "the effect on likelihood: --concept with --effect": pushed is not None,
        "stability: --other SAE, or a store of the same documents": bool(siblings),
        "tokens it promotes, and features of like direction: without --no-model": scope is not None,
        "what it disposes the model to say: --lens FILE (qwen-scope lens fit)": lens is not None,
    }  # fmt: skip
    return tuple(name for name, done in known.items() if not done)

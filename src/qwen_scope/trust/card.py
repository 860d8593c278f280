"""The feature card: everything known of a feature, what was not measured, and how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qwen_scope.errors import InputError
from qwen_scope.features import (
    FeaturePage,
    Judge,
    Lens,
    Notes,
    feature_page,
    remembered_findings,
    with_neighbours,
)
from qwen_scope.report import HasFrames, Table
from qwen_scope.scope import Scope
from qwen_scope.store import FeatureStore

from .concept import Concept, ConceptFit, concept_fit
from .facts import failures, faithfulness_of, identity, relatives
from .gather import CONCEPT, Control, Other, Record, control_of, in_other, judge_for, judged_by, pushed
from .halves import Halves, Layer, halves, layers_beside_chance
from .judged import Judged
from .kin import Kin, Relations, kin
from .options import CardOptions
from .push import Push
from .rules import Trust, TrustEvidence, TrustRules, trust
from .siblings import Sibling


@dataclass(frozen=True, eq=False, repr=False)
class Card(HasFrames):
    """One feature, with a word on how far to trust it.

    Attributes:
        page: contexts, activations, tokens it promotes, neighbours, label, notes and the newest verdict.
        identity: which SAE and model: group, fingerprint, layer, hook point, d_sae, k, architecture, model, and whether
            that is a base or an instruct model (None where the catalog does not list the group).
        phases: tokens it fires on by phase of a conversation; empty where the store tells none.
        control: its label's scores beside those of another label.
        judged: clarity, responsiveness and purity (FADE) of its label, as far as a judge told them.
        concept: how well it goes with a column of the metadata; responsiveness and purity (FADE) of that.
        faithfulness: as FADE defines it, of the shares that `validate` recorded; None without a verdict.
        push: whether adding it makes documents of the concept likelier.
        findings: what `find` learnt of it in this store, each with the documents that it tells from others.
        halves: whether it is the same on two halves of the documents.
        layers: its partners in the other layers of the store.   siblings: the feature in other dictionaries.
        parts, absorbers: features of its own dictionary that may share out what it stands for: by splitting, and by
            absorption.
        failures: what is known to be wrong, in sentences.
        missing: what was not measured, each with how to measure it.
        trust: the word and its rules.
    """

    page: FeaturePage
    identity: Mapping[str, Any]
    phases: Mapping[str, int]
    control: Control | None
    judged: Judged | None
    concept: ConceptFit | None
    faithfulness: float | None
    push: Push | None
    findings: tuple[Mapping[str, Any], ...]
    halves: Halves | None
    layers: tuple[Layer, ...]
    siblings: tuple[Sibling, ...]
    parts: tuple[Kin, ...]
    absorbers: tuple[Kin, ...]
    failures: tuple[str, ...]
    missing: tuple[str, ...]
    trust: Trust

    def sheet(self) -> Table:
        """The rules behind the word, each with whether it held: True, False, or None where it was not measured."""
        title = f"{self.trust.word}: layer {self.page.layer}, feature {self.page.feature}"
        return Table(title, ("rule", "held"), [(rule, held) for rule, held in self.trust.reasons])

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
            "judged": None if self.judged is None else self.judged.to_json(),
            "concept": None if self.concept is None else self.concept.to_json(),
            "faithfulness": self.faithfulness,
            "effect_on_likelihood": None if self.push is None else self.push.to_json(),
            "findings": [dict(one) for one in self.findings],
            "halves": None if self.halves is None else self.halves.to_json(),
            "layers": [one.to_json() for one in self.layers],
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
        concept: a column and a value of the documents' metadata that the feature is taken to stand for; None takes the
            one that the record was last asked about, if any.
        others: dictionaries to look for the feature in.
        judge: whoever scored the label, to score another label on the same contexts, and to write texts for it and rate
            others; for a label that no model wrote those are the rules that made it.

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
    page = with_neighbours(plain, store, scope, o.n, again=o.again)
    record = Record(Notes(store), layer, feature, o.again)
    sae = None if scope is None else scope.saes[layer]
    judge, concept = judge_for(page, judge), concept or record.concept()
    fit = None
    if concept is not None:
        asked = (store, layer, feature, concept, o.seed)
        fit = record.get(ConceptFit, f"{CONCEPT}{concept}", lambda: concept_fit(*asked))
    control = control_of(record, page, store, judge, o.seed)
    told = judged_by(record, page, store, judge, scope, o.seed)
    moved = pushed(record, store, scope, concept, o)
    siblings = tuple(in_other(record, store, sae, one) for one in others)
    name = f"kin, {o.n}{'' if sae is None else ', with directions'}"
    near = record.get(Relations, name, lambda: Relations(*kin(store, layer, feature, sae, o.n)))
    both = record.get_if_possible(
        "halves", Halves, f"halves, seed {o.seed}", lambda: halves(store, layer, feature, sae, o.seed)
    )
    outcome = None if page.verdict is None else str(page.verdict.get("outcome"))
    held = TrustEvidence(page.summary, page.label, control.label if control else None, fit, outcome, moved, siblings)
    found = Card(
        page, identity(store, layer), store.phase_counts(layer, feature), control, told, fit,
        faithfulness_of(page.verdict), moved, remembered_findings(store, layer, feature),
        both,
        layers_beside_chance(store, layer, feature, page.elsewhere), siblings, near.parts,
        near.absorbers,
        failures(page, rules or TrustRules()), (), trust(held, rules),
    )  # fmt: skip
    return replace(found, missing=_missing(found, record.reasons, scope, lens, relatives(store, layer)))


def _missing(
    card: Card, reasons: Mapping[str, str], scope: Scope | None, lens: Lens | None, near: Sequence[str]
) -> tuple[str, ...]:
    """What was not measured, each with why and the way to do so."""

    def why(name: str) -> str:
        return f" ({reasons[name]})" if name in reasons else ""

    page, told = card.page, card.judged
    some = f"; the catalog has {', '.join(near)}" if near else ""
    known = {
        "a label: qwen-scope label STORE --features LAYER/FEATURE": page.label is not None,
        f"another label on the same contexts{why('control')}: --ask": page.label is None or card.control is not None,
        f"clarity (FADE), on texts that a judge writes for the label{why('clarity')}: a label, a model and --ask":
            told is not None and told.clarity is not None,
        "responsiveness and purity (FADE): a label with --ask, or --concept COLUMN=VALUE":
            card.concept is not None or (told is not None and told.purity is not None),
        "faithfulness (FADE), dose and side effects: qwen-scope validate --record STORE": page.verdict is not None,
        "the effect on likelihood: --concept with --effect": card.push is not None,
        f"two halves of the documents{why('halves')}": card.halves is not None,
        f"other dictionaries: --other SAE, or a store of the same documents{some}": bool(card.siblings),
        "other checkpoints: --other with a store of the same documents, read by the other model":
            any("model" in one.differs for one in card.siblings),
        "tokens it promotes, and features of like direction: without --no-model": scope is not None,
        "what it disposes the model to say: --lens FILE (qwen-scope lens fit)": lens is not None,
    }  # fmt: skip
    return tuple(name for name, done in known.items() if not done)

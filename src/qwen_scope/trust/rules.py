"""How far to trust a feature: the rules that turn the figures of its card into one word, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen_scope.features import NOT_FLUENT, Label
from qwen_scope.store import FeatureSummary

from .concept import ConceptFit
from .push import Push
from .siblings import Sibling

SOLID, USABLE, SHAKY, UNKNOWN = "solid", "usable", "shaky", "unknown"
WORDS = (SOLID, USABLE, SHAKY, UNKNOWN)


@dataclass(frozen=True)
class TrustRules:
    """The thresholds; docs/trust.md prints the rules.

    Attributes:
        documents: the fewest documents in which a feature has to fire before anything is said.
        dense: above this share of tokens a feature is called dense.
        detection, well_detected: the least balanced accuracy of a label, by its estimate, for a name that holds, and
            for one that holds well.
        auroc, well_told: the same for the AUROC of a concept, by the low end of its interval.
        purity: the least purity (FADE) of a concept that holds well.
        found_again: the least share of the other dictionaries of its layer in which a feature has a partner, for
            `solid`.
    """

    documents: int = 10
    dense: float = 0.2
    detection: float = 0.6
    well_detected: float = 0.7
    auroc: float = 0.7
    well_told: float = 0.85
    purity: float = 0.4
    found_again: float = 0.5


@dataclass(frozen=True)
class TrustEvidence:
    """What the rules look at; None is what was not measured.

    Attributes:
        summary: how often it fires.
        label: the label to show.   control: the same contexts under another feature's label.
        concept: how well it goes with a column of the metadata.
        outcome: the newest outcome of `validate`.   push: the test by likelihood.
        siblings: other dictionaries.
    """

    summary: FeatureSummary | None = None
    label: Label | None = None
    control: Label | None = None
    concept: ConceptFit | None = None
    outcome: str | None = None
    push: Push | None = None
    siblings: Sequence[Sibling] = ()


@dataclass(frozen=True)
class Trust:
    """The word, and every rule that was looked at: its sentence, and whether it held (None: not measured)."""

    word: str
    reasons: tuple[tuple[str, bool | None], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"verdict": self.word, "rules": [{"rule": rule, "held": held} for rule, held in self.reasons]}


def trust(evidence: TrustEvidence, rules: TrustRules | None = None) -> Trust:
    """The word for a feature.

    `unknown`: it fires in too few documents, or it has no name: neither a label nor a concept.
    `shaky`: its name does not hold, or not better than another one; or it is not causal for what it is named after
    (`no effect`, `entangled`); or no other dictionary of its layer has it.
    `solid`: its name holds well, adding it moves what it is named after more than every control, it is not dense, and
    at least half of the other dictionaries of its layer that were looked at have it.
    `usable`: what is left: its name holds, and something for `solid` is missing or was not measured.
    """
    r, e = rules or TrustRules(), evidence
    fires = None if e.summary is None else e.summary.documents >= r.documents
    named = e.label is not None or e.concept is not None
    holds, well = _name(e, r)
    causal, harmless = _causal(e)
    there = [one.found for one in e.siblings if one.comparable]
    again = sum(there) / len(there) if there else None
    sparse = None if e.summary is None else e.summary.frequency <= r.dense
    reasons = (
        (f"it fires in at least {r.documents} documents", fires),
        ("it has a name: a label or a concept", named),
        (f"its name tells where it fires, better than another name: detection of at least {r.detection:g}, or AUROC of"
         f" at least {r.auroc:g} (low end)", holds),
        (f"and does so well: detection of at least {r.well_detected:g}, or AUROC of at least {r.well_told:g} (low end)"
         f" with purity of at least {r.purity:g}", well),
        ("adding it moves what it is named after more than every control", causal),
        ("validate found neither that it does nothing nor that it harms unrelated text", harmless),
        (f"it fires on at most {r.dense:.0%} of the tokens", sparse),
        (f"at least {r.found_again:.0%} of the other dictionaries of its layer have it", None if again is None else
         again >= r.found_again),
    )  # fmt: skip
    if not fires or not named:
        return Trust(UNKNOWN, reasons)
    if holds is None:
        return Trust(UNKNOWN, reasons)
    if not holds or harmless is False or again == 0:
        return Trust(SHAKY, reasons)
    solid = well and causal and sparse and (again is None or again >= r.found_again)
    return Trust(SOLID if solid else USABLE, reasons)


def _name(e: TrustEvidence, r: TrustRules) -> tuple[bool | None, bool | None]:
    """Whether the name holds, and whether well; a concept decides before a label, for it is no judge's opinion.

    A label without a control holds if it is above chance; where it was never scored beside another one, it can't
    be called good.
    """
    if e.concept is not None:
        low, other = e.concept.auroc.low, e.concept.auroc_of_other
        holds = low >= r.auroc and (other is None or low > other.high)
        return holds, holds and low >= r.well_told and e.concept.purity >= r.purity
    if e.label is None:
        return None, None
    found = e.label.detection
    holds = not e.label.at_chance and found.estimate >= r.detection
    others = [one.estimate for one in (e.control.detection if e.control else None, e.label.random) if one is not None]
    holds = holds and all(found.low > one for one in others)
    return holds, holds and bool(others) and found.estimate >= r.well_detected


def _causal(e: TrustEvidence) -> tuple[bool | None, bool | None]:
    """Whether it is causal for its name, and whether nothing speaks against it; what `validate` found comes first."""
    if e.outcome is not None:
        return e.outcome == "causal", e.outcome in ("causal", NOT_FLUENT, "correlated only")
    if e.push is not None:
        return e.push.causal, None
    return None, None

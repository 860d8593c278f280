"""`match`: which features of two dictionaries are the same, by direction and by firing, beside what chance gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from qwen_scope.errors import MismatchError, NotFoundError
from qwen_scope.report import HasFrames, Progress, Table
from qwen_scope.sae import SAE, FeatureActs, Identity
from qwen_scope.stats import Interval, bootstrap

from .cofire import chance_cofirings, check_same_tokens, cofired, fired
from .match_options import MatchOptions
from .nearest import NONE, Best, Columns, chance_cosines, every_column, nearest

MARGIN = 0.02
"""A corrected mean whose interval reaches down to this is called chance."""
BEYOND = 0.99
"""The share of what chance gives that a single feature has to exceed."""


@dataclass(frozen=True)
class Chance:
    """What the best partner of a feature scores where the other dictionary is shuffled.

    Attributes:
        mean: over features and draws.   high: the score that `BEYOND` of them do not exceed.
        share: of them with a partner.   n: how many features, draws counted.
    """

    mean: float
    high: float
    share: float
    n: int


@dataclass(frozen=True, eq=False)
class Partners:
    """The best partner of features of `a` among those of `b` by one measure.

    Attributes:
        measure: `cosine` of decoder columns, or `jaccard` of the tokens they fire on.
        least: from which score on two features are partners.
        features: of `a`; by `jaccard` those alone that fire.   partner: of each, `NONE` where nothing scores above 0.
        score: of each with its partner.   mutual: whether each is its partner's best as well.
        back: the best of each feature of `b` that is known, by its number; None where some features of `a` were asked.
        chance: what a shuffled `b` gives.
        corrected: `(mean - chance) / (1 - chance)`, 0 at chance and 1 where all are found again, the form in which
            Hubert and Arabie (1985) correct an index for chance; `mean` is the mean best score (by `cosine` the mean
            max cosine similarity of Sharkey et al. 2022), with a bootstrap interval over a sample of features. None
            where some features of `a` were asked.
    """

    measure: str
    least: float
    features: Int64[np.ndarray, " n"]
    partner: Int64[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]
    mutual: Bool[np.ndarray, " n"]
    back: Best | None
    chance: Chance
    corrected: Interval | None

    @property
    def matched(self) -> Bool[np.ndarray, " n"]:
        """Which features have a partner: a score of at least `least`."""
        return self.score >= self.least

    @property
    def share(self) -> float:
        """The share of features with a partner."""
        return float(self.matched.mean()) if len(self.score) else 0.0

    @property
    def mutual_share(self) -> float:
        """The share with a partner whose own best they are."""
        return float((self.matched & self.mutual).mean()) if len(self.score) else 0.0

    @property
    def mean(self) -> float:
        """The mean best score."""
        return float(self.score.mean()) if len(self.score) else 0.0

    @property
    def at_chance(self) -> bool | None:
        """Whether a shuffled dictionary does about as well; None where some features of `a` were asked."""
        return None if self.corrected is None else self.corrected.low <= MARGIN

    @property
    def unmatched(self) -> list[int]:
        """Features of `a` without a partner."""
        return self.features[~self.matched].tolist()

    @property
    def unmatched_back(self) -> list[int] | None:
        """Features of `b` without a partner; by `jaccard` those alone that fire."""
        if self.back is None:
            return None
        known = self.back.score >= (0 if self.measure == "cosine" else np.nextafter(0, 1))
        return np.flatnonzero(known & (self.back.score < self.least)).tolist()

    def of(self, feature: int) -> tuple[int, float, bool]:
        """Partner, score and whether it is mutual, of one feature.

        Raises:
            NotFoundError: it was not asked about, or never fires.
        """
        at = np.flatnonzero(self.features == feature)
        if not len(at):
            raise NotFoundError(f"feature {feature} is not among the {len(self.features)} that were compared")
        return int(self.partner[at[0]]), float(self.score[at[0]]), bool(self.mutual[at[0]])

    def to_json(self) -> dict[str, Any]:
        """The figures, and both lists of features without a partner."""
        names = ("measure", "least", "share", "mutual_share", "mean", "at_chance", "unmatched", "unmatched_back")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        corrected = None if self.corrected is None else asdict(self.corrected)
        return {**found, "features": len(self.features), "chance": asdict(self.chance), "corrected": corrected}


@dataclass(frozen=True, eq=False, repr=False)
class Matching(HasFrames):
    """Two dictionaries beside each other.

    Attributes:
        a, b: which.   cosine: partners by decoder cosine.
        jaccard: partners by co-firing; None where no activations were given.   tokens: on how many tokens, or None.
    """

    a: Identity
    b: Identity
    cosine: Partners
    jaccard: Partners | None = None
    tokens: int | None = None

    @property
    def agree(self) -> float | None:
        """Of the features that fire and have a partner by cosine, the share whose best by co-firing is the same one;
        None without activations, or where there is no such feature."""
        if self.jaccard is None:
            return None
        place = np.searchsorted(self.cosine.features, self.jaccard.features)
        matched = self.cosine.matched[place]
        same = self.cosine.partner[place] == self.jaccard.partner
        return float(same[matched].mean()) if matched.any() else None

    def rows(self) -> list[dict[str, Any]]:
        """One row per feature of `a`: its partners and how well they fit."""
        found = {
            f: {"feature": f, "partner": _named(p), "cosine": s, "mutual": m, "cofires_with": None, "jaccard": None}
            for f, p, s, m in _columns(self.cosine)
        }
        for f, p, s, _ in _columns(self.jaccard) if self.jaccard is not None else ():
            found[f] |= {"cofires_with": _named(p), "jaccard": s}
        return list(found.values())

    def sheet(self) -> Table:
        """`rows` as a table."""
        columns = ("feature", "partner", "cosine", "mutual", "cofires_with", "jaccard")
        return Table.of(f"{self.a} beside {self.b}", self.rows(), columns)

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        jaccard = None if self.jaccard is None else self.jaccard.to_json()
        known = {"a": asdict(self.a), "b": asdict(self.b), "tokens": self.tokens, "agree": self.agree}
        return {**known, "cosine": self.cosine.to_json(), "jaccard": jaccard}


def match(
    a: SAE,
    b: SAE,
    seen: tuple[FeatureActs, FeatureActs] | None = None,
    options: MatchOptions | None = None,
    *,
    features: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Matching:
    """Pair the features of two dictionaries by the cosine of their decoder columns, and by the tokens they fire on.

    The dictionaries may differ in k, width, seed, layer, checkpoint and maker; their residuals have one width. Memory
    holds tiles of `options.tile` features squared, and sparse counts, whatever `d_sae`.

    Args:
        seen: what both find on the same tokens, row by row; `common_firings` reads it from two stores.
        features: of `a`, to ask about some alone; chance is drawn on a sample of all.
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        MismatchError: residuals of different widths, activations of different numbers of tokens or of other widths.
        NotFoundError: a feature that `a` does not have.   InputError: weights that are not finite.
    """
    o = options or MatchOptions()
    if a.d_model != b.d_model:
        raise MismatchError(
            f"{a.identity.group} reads residuals of {a.d_model} dimensions and {b.identity.group} of {b.d_model}:"
            " directions of different spaces can't be compared"
        )
    chosen = np.arange(a.d_sae) if features is None else _checked(features, a)
    tell = progress or (lambda stage, share, text: None)
    cosine = _by_cosine(a, b, chosen, features is None, o, tell)
    if seen is None:
        return Matching(a.identity, b.identity, cosine)
    check_same_tokens(*seen)
    for sae, acts in zip((a, b), seen, strict=True):
        if acts.width != sae.d_sae:
            raise MismatchError(f"activations of {acts.width} features are none of {sae.identity}: it has {sae.d_sae}")
    jaccard = _by_firing(*seen, chosen, features is None, o, tell)
    return Matching(a.identity, b.identity, cosine, jaccard, seen[0].shape.numel())


def _by_cosine(a: SAE, b: SAE, chosen: np.ndarray, whole: bool, o: MatchOptions, tell: Progress) -> Partners:
    every, others = every_column(a), every_column(b)
    there, back = nearest(Columns(a, chosen), others, o.tile, lambda done: tell("cosines", done, ""))
    if not whole:
        wanted = np.unique(there.partner[there.partner != NONE])
        known = nearest(Columns(b, wanted), every, o.tile)[0] if len(wanted) else Best(wanted, np.zeros(0))
        back = _spread(wanted, known, b.d_sae)
    tell("chance", 0.0, "")
    sample = np.random.default_rng(o.seed).permutation(a.d_sae)[: o.sample]
    null = chance_cosines(every, others, sample, o.draws, o.tile, o.seed)
    tell("chance", 1.0, "")
    return _partners("cosine", o.cosine, chosen, there, back, null, sample if whole else None, whole)


def _by_firing(
    a: FeatureActs, b: FeatureActs, chosen: np.ndarray, whole: bool, o: MatchOptions, tell: Progress
) -> Partners:
    mine, others = fired(a), fired(b)
    alive = np.flatnonzero(np.diff(mine.tocsc().indptr))
    asked = np.intersect1d(chosen, alive)
    there, back = cofired(mine, others, asked, lambda done: tell("co-firing", done, ""))
    if not whole:
        wanted = np.unique(there.partner[there.partner != NONE])
        back = _spread(wanted, cofired(others, mine, wanted)[0], b.width)
    places = np.random.default_rng(o.seed).permutation(len(alive))[: o.sample]
    null = chance_cofirings(mine, others, alive[places], o.draws, o.seed)
    return _partners("jaccard", o.jaccard, asked, there, back, null, places if whole else None, whole)


def _partners(
    measure: str,
    least: float,
    features: np.ndarray,
    there: Best,
    back: Best,
    null: np.ndarray,
    sample: np.ndarray | None,
    whole: bool,
) -> Partners:
    """Both directions as one answer; `sample` are the places in `features` that `null` is about."""
    found = there.partner != NONE
    mutual = np.zeros(len(features), bool)
    mutual[found] = back.partner[there.partner[found]] == features[found]
    chance = Chance(0.0, 0.0, 0.0, 0)
    if null.size:
        high = float(np.quantile(null, BEYOND))
        chance = Chance(float(null.mean()), high, float((null >= least).mean()), null.size)
    corrected = None
    if sample is not None and len(sample) > 1 and chance.mean < 1:
        corrected = _corrected(there.score, there.score[sample], null.mean(0))
    seen_from = back if whole else None
    return Partners(measure, least, features, there.partner, there.score, mutual, seen_from, chance, corrected)


def _corrected(every: np.ndarray, some: np.ndarray, null: np.ndarray) -> Interval:
    """`(mean - chance) / (1 - chance)`; its interval is that of the ratio, linearised, over the sample."""
    chance = float(null.mean())
    estimate, here = ((float(scores.mean()) - chance) / (1 - chance) for scores in (every, some))
    spread = bootstrap(here + (some - null - here * (1 - null)) / (1 - chance))
    low, high = (end + estimate - here for end in (spread.low, spread.high))
    return Interval(estimate, low, high, spread.n, spread.level)


def _spread(features: np.ndarray, known: Best, width: int) -> Best:
    """What is known of some features as a list of all."""
    partner, score = np.full(width, NONE, np.int64), np.zeros(width)
    partner[features], score[features] = known.partner, known.score
    return Best(partner, score)


def _checked(features: Sequence[int], sae: SAE) -> np.ndarray:
    wanted = np.unique(np.asarray(list(features), np.int64))
    if not len(wanted) or wanted[0] < 0 or wanted[-1] >= sae.d_sae:
        raise NotFoundError(f"{sae.identity} has features 0 to {sae.d_sae - 1}, not {list(features)!r:.60}")
    return wanted


def _named(partner: int) -> int | None:
    return None if partner == NONE else partner


def _columns(one: Partners) -> zip[tuple[int, int, float, bool]]:
    return zip(one.features.tolist(), one.partner.tolist(), one.score.tolist(), one.mutual.tolist(), strict=True)

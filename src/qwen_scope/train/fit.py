"""Whether an SAE fits a checkpoint: figures with intervals, and by a fixed rule one of four words; see docs/fits.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qwen_scope.scope import DO_NOT_USE, FITS, LOSSES, UNTOLD
from qwen_scope.stats import ClusterSums
from qwen_scope.text import PHASES

from .moves import Moves
from .pair import PairSums
from .transfer import Estimate

# The rule; docs/fits.md says the same in words.
DOCUMENTS, TOKENS, PHASE_TOKENS = 20, 2000, 500
EV_FALL, EV_SHARE, EV_HALF = 0.05, 0.2, 0.5
CE_FALL, CE_FAR = 0.02, 0.2
SHARED, STRANGERS = 0.5, 0.2
LEAST_RISE = 0.05  # nats
ALONE_EV, ALONE_CE = (0.7, 0.2), (0.95, 0.8)

Sums = Mapping[str, np.ndarray]
Figure = Callable[[Sums], np.ndarray]


@dataclass(frozen=True)
class Criterion:
    """One line of the rule: by how much its figure is on the good side of each border, with intervals.

    Attributes:
        figure: what is judged.
        found: its value, in words.
        good: at least 0 where it is good enough to fit.   bad: at most 0 where it is bad enough not to be used; either
            is None where it can't be told.
    """

    figure: str
    found: str
    good: Estimate | None
    bad: Estimate | None

    @property
    def proven_good(self) -> bool:
        return self.good is not None and self.good.low >= 0

    @property
    def proven_bad(self) -> bool:
        return self.bad is not None and self.bad.high <= 0

    @property
    def open(self) -> bool:
        """Whether the interval allows both ends."""
        return self.good is not None and self.bad is not None and self.good.high >= 0 and self.bad.low <= 0


@dataclass(frozen=True)
class Fit:
    """One layer's verdict and what it rests on.

    Attributes:
        verdict: `fits`, `fits with losses`, `do not use` or `not enough text`.
        why: what keeps it from a better one, a clause each; empty for `fits`.
        tokens, documents: that count on both checkpoints.
        figures: estimates by name: `ev_base`, `ev_post` and `ev_fall` (explained variance), `ce_base`, `ce_post` and
            `ce_fall` (CE loss recovered), `jaccard`, and `over_control`, by how many nats per token the loss with the
            reconstruction is below that with the mean residual. Those of the base are missing without one.
        phases: the same of each phase, of which there are at least two.
        moves: which features move; None without a base, and of phases.
    """

    verdict: str
    why: tuple[str, ...]
    tokens: int
    documents: int
    figures: Mapping[str, Estimate]
    phases: Mapping[str, Fit] = field(default_factory=dict)
    moves: Moves | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def fit(sums: PairSums, *, seed: int = 0) -> Fit:
    """The verdict from one layer's sums, which have to hold losses.

    Raises:
        InputError: fewer than two documents.
    """
    whole = judged(sums.by_document(), TOKENS, seed)
    found = {}
    if len(sums.phases) > 1:
        found = {PHASES[phase]: judged(sums.by_document(phase), PHASE_TOKENS, seed) for phase in sums.phases}
    verdict, why = whole.verdict, whole.why
    bad = [name for name, one in found.items() if one.verdict == DO_NOT_USE]
    if bad and verdict == FITS:
        verdict, why = LOSSES, (f"do not use on {' and '.join(bad)}",)
    moves = None if sums.moves is None else sums.moves.result()
    return Fit(verdict, why, whole.tokens, whole.documents, whole.figures, found, moves)


def judged(columns: Sums, least: int, seed: int) -> Fit:
    """The verdict from sums by document."""
    tokens, documents = int(columns["tokens"].sum()), int((columns["tokens"] > 0).sum())
    few = []
    if documents < DOCUMENTS:
        few.append(f"{documents} documents, {DOCUMENTS} are needed")
    if tokens < least:
        few.append(f"{tokens:,} tokens that count, {least:,} are needed")
    if len(columns["tokens"]) < 2 or not tokens:
        return Fit(UNTOLD, tuple(few), tokens, documents, {})
    figures, criteria = measured(ClusterSums(columns, seed=seed), paired="error_base" in columns)
    verdict, why = judge(criteria)
    return Fit(UNTOLD if few else verdict, tuple(few) or why, tokens, documents, figures)


def judge(criteria: list[Criterion]) -> tuple[str, tuple[str, ...]]:
    """The word, and what keeps it from a better one."""
    if bad := [one for one in criteria if one.proven_bad]:
        return DO_NOT_USE, tuple(one.found for one in bad)
    short = tuple(one.found for one in criteria if not one.proven_good)
    if not short:
        return FITS, ()
    could_fit = all(one.good is not None and one.good.high >= 0 for one in criteria)
    if could_fit and any(one.open for one in criteria):
        return UNTOLD, short
    return LOSSES, short


def measured(drawn: ClusterSums, paired: bool) -> tuple[dict[str, Estimate], list[Criterion]]:
    """The figures with their intervals, and the lines of the rule."""

    def estimate(figure: Figure) -> Estimate:
        return Estimate.of(drawn.interval(figure))

    def ev(which: str) -> Figure:
        return lambda s: 1 - s[f"error_{which}"] / s[f"total_{which}"]

    def rise(which: str) -> Figure:
        return lambda s: (s[f"zero_{which}"] - s[f"clean_{which}"]) / s["predicted"]

    def recovered(which: str) -> Figure:
        return lambda s: (s[f"zero_{which}"] - s[f"spliced_{which}"]) / (s[f"zero_{which}"] - s[f"clean_{which}"])

    def over(s: Sums) -> np.ndarray:
        return (s["mean_post"] - s["spliced_post"]) / s["predicted"]

    told = all(estimate(rise(which)).low >= LEAST_RISE for which in (("base", "post") if paired else ("post",)))
    names: dict[str, Figure] = {"ev_post": ev("post"), "over_control": over}
    if told:
        names["ce_post"] = recovered("post")
    if paired:
        names |= {"ev_base": ev("base"), "ev_fall": lambda s: ev("base")(s) - ev("post")(s)}
        names["jaccard"] = lambda s: s["jaccard"] / s["tokens"]
        if told:
            names |= {"ce_base": recovered("base"), "ce_fall": lambda s: recovered("base")(s) - recovered("post")(s)}
    figures = {name: estimate(figure) for name, figure in names.items()}
    margin = Margins(figures, names, estimate)
    return figures, [*(margin.paired() if paired else margin.alone()), margin.control()]


@dataclass(frozen=True)
class Margins:
    """The lines of the rule from figures.

    Args:
        figures: with their intervals.   names: what each is computed by.   estimate: what gives intervals.
    """

    figures: Mapping[str, Estimate]
    names: Mapping[str, Figure]
    estimate: Callable[[Figure], Estimate]

    def paired(self) -> list[Criterion]:
        """Beside the base."""
        base, post, fall = (self.names[name] for name in ("ev_base", "ev_post", "ev_fall"))
        found = f"explained variance {said(self.figures['ev_post'])} and {said(self.figures['ev_base'])} on the base"
        lines = [
            Criterion(
                "explained variance",
                found,
                self.estimate(lambda s: np.minimum(EV_FALL, EV_SHARE * base(s)) - fall(s)),
                self.estimate(lambda s: post(s) - EV_HALF * base(s)),
            ),
            Criterion(
                "active features",
                f"Jaccard overlap of active features with the base {said(self.figures['jaccard'])}",
                self.beyond("jaccard", SHARED),
                self.beyond("jaccard", STRANGERS),
            ),
        ]
        if "ce_fall" not in self.names:
            return [*lines, self.untold()]
        found = f"CE loss recovered {said(self.figures['ce_post'])} and {said(self.figures['ce_base'])} on the base"
        return [*lines, Criterion("CE", found, self.below("ce_fall", CE_FALL), self.below("ce_fall", CE_FAR))]

    def alone(self) -> list[Criterion]:
        """Without the base."""
        lines = [
            Criterion(
                "explained variance",
                f"explained variance {said(self.figures['ev_post'])}",
                *(self.beyond("ev_post", border) for border in ALONE_EV),
            )
        ]
        if "ce_post" not in self.names:
            return [*lines, self.untold()]
        found = f"CE loss recovered {said(self.figures['ce_post'])}"
        return [*lines, Criterion("CE", found, *(self.beyond("ce_post", border) for border in ALONE_CE))]

    def untold(self) -> Criterion:
        """CE loss recovered where zeros do not harm the predictions."""
        return Criterion(
            "CE", "zeros at this layer don't raise the loss, so CE loss recovered can't be told", None, None
        )

    def control(self) -> Criterion:
        """Against the mean residual."""
        over = self.figures["over_control"]
        found = f"the loss with reconstructions is {said(over)} nats below that with the mean residual"
        return Criterion("control", found, over, over)

    def beyond(self, name: str, border: float) -> Estimate:
        """By how much a figure is above a border."""
        one = self.figures[name]
        return Estimate(one.value - border, one.low - border, one.high - border)

    def below(self, name: str, border: float) -> Estimate:
        """By how much a figure is below a border."""
        one = self.figures[name]
        return Estimate(border - one.value, border - one.high, border - one.low)


def said(one: Estimate) -> str:
    """A value with its interval."""
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"

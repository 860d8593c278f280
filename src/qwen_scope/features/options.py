"""What the functions of this room are asked for, as values; light enough for `--help`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from qwen_scope.errors import InputError, check_count, check_number

if TYPE_CHECKING:
    import numpy as np

    from qwen_scope.text import Counted

By = Literal["f1", "difference", "rate", "auroc"]
"""What ranks features in a search."""


@dataclass(frozen=True)
class ChangeOptions:
    """What to change: one feature, or what a saved recipe says.

    Attributes:
        feature: its name, LAYER/FEATURE.
        op: `add`, `scale`, `clamp`, `floor`, `cap` or `ablate`.
        amount: how much, in `unit`; `scale` has no unit, and `ablate` no amount.
        unit: `resid_norm` (lengths of the layer's typical residual), `max_act` or `raw`.
        where: which tokens, as `Where.parse` reads them.
        recipe: the file of a recipe, instead of a feature.
    """

    feature: str | None = None
    op: str = "add"
    amount: float | None = None
    unit: str = "resid_norm"
    where: str = "all"
    recipe: str | os.PathLike[str] | None = None


@runtime_checkable
class RuleLike(Protocol):
    """A classifier made of features, such as `analysis.Rule`; `positive` decides by the largest activation of each."""

    @property
    def layers(self) -> list[int]: ...
    @property
    def features(self) -> Sequence[Any]: ...
    @property
    def counted(self) -> Counted: ...
    def check_sae(self, layer: int, fingerprint: str, width: int) -> None: ...
    def positive(self, values: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class TargetOptions:
    """What a sweep or a verdict aims at: exactly one of these.

    Attributes:
        regex: the share of texts in which a regular expression is found.
        script: the share of letters in a Unicode script, such as `CYRILLIC`.
        continuation: how likely the model finds these continuations.
        target_feature: the mean activation of a feature, LAYER/FEATURE.
        rule: the share of texts that a classifier's rule calls positive.
    """

    regex: str | None = None
    script: str | None = None
    continuation: tuple[str, ...] = ()
    target_feature: str | None = None
    rule: RuleLike | None = None


@dataclass(frozen=True)
class Budget:
    """What fluency may cost.

    Attributes:
        perplexity_ratio: at most this many times the reference's perplexity under the unsteered model.
        repetition: at most this much above the unsteered share of repeated 3-grams.
        tolerance: how much of the largest effect may be given up for a smaller amount.
    """

    perplexity_ratio: float = 2.0
    repetition: float = 0.1
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_number("perplexity_ratio of a budget", self.perplexity_ratio, 1)
        check_number("repetition of a budget", self.repetition, 0)
        check_number("tolerance of a budget", self.tolerance, 0)


@dataclass(frozen=True)
class SweepOptions:
    """The grid of a sweep and its aim.

    Attributes:
        amounts: what the interventions' own amounts are multiplied by; None: `GRID` in lengths of the layer's median
            residual, for shares `SHARES`.
        lower: the aim is to lower the target instead of raising it.
        budget: what fluency may cost.
        refine: this many more amounts, each halfway (geometrically) between the best one and the next that is too much.

    Raises:
        InputError: no finite amount other than 0, or a number of refinements below 0.
    """

    amounts: tuple[float, ...] | None = None
    lower: bool = False
    budget: Budget = field(default_factory=Budget)
    refine: int = 2

    def __post_init__(self) -> None:
        check_count("refine", self.refine, 0)
        if self.amounts is not None and not (any(self.amounts) and all(map(math.isfinite, self.amounts))):
            raise InputError("the grid of a sweep holds at least one finite amount other than 0")


@dataclass(frozen=True)
class Rules:
    """What a verdict asks for; printed beside it.

    Attributes:
        margin: how much the target has to move, and by how much more than under random features.
        detects: on how much larger a share of the tokens of positive than of negative examples it has to fire.
        side_ratio: how many times the KL of the difference-of-means direction, of equal length, unrelated text may
            suffer.
        task_loss: how much of a task's accuracy may be lost.
        perplexity_ratio: how many times the reference's perplexity under the unsteered model the text may have.
        repetition: how much its share of repeated 3-grams may rise. Both are the budget that `sweep` keeps.
        fewest: samples per condition and examples per side; below it there is no verdict.
        fewest_random: random features; with 19, being above all of them has a chance of one in twenty.
        fewest_shuffled: shuffles of the examples' labels; one alone may happen to point where the real labels do.

    Raises:
        InputError: a rule that is no number, or outside its range.
    """

    margin: float = 0.1
    detects: float = 0.1
    side_ratio: float = 2.0
    task_loss: float = 0.1
    perplexity_ratio: float = 2.0
    repetition: float = 0.1
    fewest: int = 20
    fewest_random: int = 19
    fewest_shuffled: int = 5

    def __post_init__(self) -> None:
        for name in ("margin", "detects", "task_loss", "repetition"):
            check_number(f"{name} of the rules", getattr(self, name), 0)
        for name in ("side_ratio", "perplexity_ratio"):
            check_number(f"{name} of the rules", getattr(self, name), 1)
        for name, least in (("fewest", 2), ("fewest_random", 1), ("fewest_shuffled", 2)):
            check_count(f"{name} of the rules", getattr(self, name), least)


@dataclass(frozen=True)
class ValidateOptions:
    """The controls of a verdict.

    Attributes:
        lower: the interventions are expected to lower the target.
        n_random: matched random features.
        n_shuffled: shuffles of the examples' labels.
        rules: what the verdict asks for.
        seed: of the controls and the intervals.

    Raises:
        InputError: a number below 0.
    """

    lower: bool = False
    n_random: int = 19
    n_shuffled: int = 9
    rules: Rules = field(default_factory=Rules)
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("n_random", self.n_random, 0)
        check_count("n_shuffled", self.n_shuffled, 0)
        check_count("a seed", self.seed, 0)


@dataclass(frozen=True)
class FindOptions:
    """How a search ranks and what it believes.

    Attributes:
        n: how many features to return.
        by: what ranks: `f1` of the single feature, cross-validated (those within one standard error of the best by how
            far the means lie apart, in standard deviations inside the sets), `difference` of mean activations, `rate`
            (the difference of the shares of documents in which it fires, the score of Qwen-Scope's toxicity study), or
            `auroc`.
        level: the false discovery rate.
        reductions: `max`, `mean` or both; the better one stands for a feature.
        seed: of the halves that choose and measure, and of the intervals.
        phases: only tokens of these phases of a conversation; in a store.
        against: compare the documents' tokens of `phases` with their tokens of these phases.

    Raises:
        InputError: an option that does not exist, `against` without `phases` or with one of them, a number below 1,
            or a rate outside (0, 1).
    """

    n: int = 10
    by: By = "f1"
    level: float = 0.01
    reductions: tuple[str, ...] = ("max", "mean")
    seed: int = 0
    phases: tuple[str, ...] | None = None
    against: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.against is not None and (self.phases is None or set(self.phases) & set(self.against)):
            raise InputError("against compares with other phases than phases names, such as thinking against answer")
        if self.by not in get_args(By):
            raise InputError(f"features are ranked by {', '.join(get_args(By))}, not {self.by!r}")
        check_count("n", self.n)
        if not 0 < self.level < 1:
            raise InputError(f"a false discovery rate lies between 0 and 1, not at {self.level}")

"""From figures to one word: the rules of a verdict, as data and as one pure function."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_scope.errors import InputError
from qwen_scope.stats import Interval

OUTCOMES = ("causal", "correlated only", "entangled", "no effect")


@dataclass(frozen=True)
class Rules:
    """What a verdict asks for; printed beside it.

    Attributes:
        margin: how much the target has to move, and by how much more than under random features.
        detects: on how much larger a share of the tokens of positive than of negative examples it has to fire.
        side_ratio: how many times the KL of the difference-of-means direction, of equal length, unrelated text may
            suffer.
        task_loss: how much of a task's accuracy may be lost.
        fewest: samples per arm and examples per side; below it there is no verdict.
        fewest_random: random features; with 19, being above all of them has a chance of one in twenty.
    """

    margin: float = 0.1
    detects: float = 0.1
    side_ratio: float = 2.0
    task_loss: float = 0.1
    fewest: int = 20
    fewest_random: int = 19

    def __post_init__(self) -> None:
        if min(self.margin, self.detects, self.task_loss) < 0 or self.side_ratio < 1:
            raise InputError("the rules of a verdict have margins from 0 and a side_ratio from 1")
        if self.fewest < 2 or self.fewest_random < 1:
            raise InputError("a verdict needs at least 2 samples and 1 random feature")


@dataclass(frozen=True)
class Evidence:
    """The figures that decide, each a difference with its interval, counted towards the aim.

    Attributes:
        gain: the target under the feature minus unsteered.
        over_random: minus all random features together.
        over_each_random: how many of the random features reach the feature's mean.
        over_opposite: minus the opposite sign.
        over_shuffled: minus the difference-of-means direction of shuffled labels.
        detection: the share of a positive example's tokens on which the feature fires, minus that of negative ones.
        side: the KL on unrelated text minus `side_ratio` times that of the difference-of-means direction.
        tasks: per task the accuracy lost.
    """

    gain: Interval
    over_random: Interval
    over_each_random: int
    over_opposite: Interval
    over_shuffled: Interval
    detection: Interval
    side: Interval
    tasks: dict[str, Interval] = field(default_factory=dict)


def judge(evidence: Evidence, rules: Rules) -> tuple[str, tuple[str, ...]]:
    """The outcome, and every rule with what was found.

    `causal`: the target moves, more than under random features, the opposite sign and shuffled labels, and nothing
    else suffers unduly; `entangled`: it moves, but something else suffers; `correlated only`: it does not move, but
    the feature tells the examples apart; `no effect`: neither.
    """
    moves = {
        f"the target moves by more than {rules.margin:g}: {evidence.gain}": evidence.gain.low > rules.margin,
        f"by more than {rules.margin:g} beyond random features: {evidence.over_random}": evidence.over_random.low
        > rules.margin,
        f"no random feature does as much: {evidence.over_each_random} do": evidence.over_each_random == 0,
        f"the opposite sign does less: {evidence.over_opposite}": evidence.over_opposite.low > 0,
        f"shuffled labels do less: {evidence.over_shuffled}": evidence.over_shuffled.low > 0,
    }
    harms = {
        f"unrelated text suffers more than {rules.side_ratio:g} times what the difference of means does to it:"
        f" excess KL {evidence.side}": evidence.side.low > 0,
    }
    for name, lost in evidence.tasks.items():
        harms[f"{name} loses more than {rules.task_loss:g}: {lost}"] = lost.low > rules.task_loss
    detects = {
        f"it fires on more tokens of positive examples, by over {rules.detects:g}: {evidence.detection}": (
            evidence.detection.low > rules.detects
        )
    }
    reasons = tuple(f"{'yes' if held else 'no'}: {rule}" for rule, held in {**moves, **harms, **detects}.items())
    if all(moves.values()):
        return ("entangled" if any(harms.values()) else "causal"), reasons
    return ("correlated only" if all(detects.values()) else "no effect"), reasons

"""From figures to one word: the rules of a verdict, as data and as one pure function."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_scope.stats import Interval

from .options import Rules

NOT_FLUENT = "causal, but breaks fluency"
OUTCOMES = ("causal", NOT_FLUENT, "correlated only", "entangled", "no effect")


@dataclass(frozen=True)
class Evidence:
    """The figures that decide, each a difference with its interval, counted towards the aim.

    Attributes:
        gain: the target under the feature minus unsteered.
        over_random: minus all random features together.
        over_each_random: how many of the random features reach the feature's mean.
        over_opposite: minus the opposite sign.
        over_shuffled: minus the mean over all shuffles of the labels, each one difference-of-means direction; prompts
            and shuffles are resampled.
        detection: the share of a positive example's tokens on which the feature fires, minus that of negative ones.
        side: the KL on unrelated text minus `side_ratio` times that of the difference-of-means direction.
        fluency: the perplexity of the text under the unsteered model, over that of the reference.
        repetition: the share of repeated 3-grams, minus unsteered.
        tasks: per task the accuracy lost.
    """

    gain: Interval
    over_random: Interval
    over_each_random: int
    over_opposite: Interval
    over_shuffled: Interval
    detection: Interval
    side: Interval
    fluency: Interval
    repetition: Interval
    tasks: dict[str, Interval] = field(default_factory=dict)


def judge(evidence: Evidence, rules: Rules) -> tuple[str, tuple[str, ...]]:
    """The outcome, and every rule with what was found.

    `causal`: the target moves, more than under random features, the opposite sign and shuffled labels, and nothing
    else suffers unduly; `causal, but breaks fluency`: the same, but its text leaves the fluency budget (by the
    estimates, as in `sweep`); `entangled`: the target moves, but unrelated text or a task suffers; `correlated only`:
    it does not move, but the feature tells the examples apart; `no effect`: neither.
    """
    e = evidence
    moves = {
        f"the target moves by more than {rules.margin:g}: {e.gain}": e.gain.low > rules.margin,
        f"by more than {rules.margin:g} beyond random features: {e.over_random}": e.over_random.low > rules.margin,
        f"no random feature does as much: {e.over_each_random} do": e.over_each_random == 0,
        f"the opposite sign does less: {e.over_opposite}": e.over_opposite.low > 0,
        f"shuffled labels do less: {e.over_shuffled}": e.over_shuffled.low > 0,
    }
    harms = {
        f"unrelated text suffers more than {rules.side_ratio:g} times what the difference of means does to it:"
        f" excess KL {e.side}": e.side.low > 0,
    }
    for name, lost in e.tasks.items():
        harms[f"{name} loses more than {rules.task_loss:g}: {lost}"] = lost.low > rules.task_loss
    fluent = {
        f"the text keeps within {rules.perplexity_ratio:g} times the perplexity: {e.fluency}": e.fluency.estimate
        <= rules.perplexity_ratio,
        f"it repeats itself by at most {rules.repetition:g} more: {e.repetition}": e.repetition.estimate
        <= rules.repetition,
    }
    detects = {
        f"it fires on more tokens of positive examples, by over {rules.detects:g}: {e.detection}": (
            e.detection.low > rules.detects
        )
    }
    found = {**moves, **fluent, **harms, **detects}
    reasons = tuple(f"{'yes' if held else 'no'}: {rule}" for rule, held in found.items())
    if not all(moves.values()):
        return ("correlated only" if all(detects.values()) else "no effect"), reasons
    if any(harms.values()):
        return "entangled", reasons
    return ("causal" if all(fluent.values()) else NOT_FLUENT), reasons

"""Which features carry endless repetition in a model, checked causally, as a recipe that RL steers with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from qwen_scope.errors import InputError
from qwen_scope.features import repeat_features, repeats_in_texts
from qwen_scope.scope import Scope
from qwen_scope.stats import Interval, bootstrap
from qwen_scope.steer import Intervention, Recipe

from .loops import Answer, LoopShare, Sampling, loop_share

FEWEST = 5
"""Fewer looping texts than this say nothing about features."""

KEPT_TURNS = 2
"""So many turns of a loop stand before an answer that is continued to see whether the loop goes on."""


@dataclass(frozen=True)
class CausalCheck:
    """What the features do to looping, on the model before any training; all with the same draws on both sides.

    Attributes:
        normal, amplified: share of answers to ordinary prompts that loop, without and with `h + alpha d`.
        raises: the second less the first, over prompts.
        looping, suppressed: share of answers that go on looping when continued from the second turn of a loop, without
            and with `h - alpha d`.
        lowers: the first less the second, over answers.
    """

    normal: Interval
    amplified: Interval
    raises: Interval
    looping: Interval
    suppressed: Interval
    lowers: Interval

    @property
    def holds(self) -> bool:
        """Whether both differences are above zero by their intervals."""
        return self.raises.low > 0 and self.lowers.low > 0

    def numbers(self) -> dict[str, dict[str, float]]:
        """Plain figures by name."""
        return {name: {key: float(value) for key, value in one.items()} for name, one in asdict(self).items()}


def repetition_recipe(
    scope: Scope,
    prompts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    features: int = 4,
    amount: float = 0.5,
    samples: int = 1,
    sampling: Sampling | None = None,
    looping: Sequence[str] = (),
    say: Callable[[str, float], None] | None = None,
) -> Recipe:
    """Sample answers, take the features that rise most within those that loop, and check what they do.

    A feature's rise is its activation at the last occurrence of a token less that at the first, so that the token is
    the same; the features are those of the largest rise that is significant (`qwen_scope.features.repeat_features`).

    Args:
        prompts: as the model reads them, up to where the answer begins.
        layers: to choose among; None for all that have an SAE.
        features: how many in all.
        amount: of each, in median residual norms of its layer.
        samples: answers per prompt to look for loops in.
        looping: texts that loop, prompt and answer, beside those that the model makes.

    Returns:
        A recipe in raw units whose `effect` holds the figures of the check, and whether it holds.

    Raises:
        InputError: too few loops, no feature that rises, or what `loop_share` refuses.
    """
    sampling, report = sampling or Sampling(), say or (lambda stage, share: None)
    found = shares(scope, prompts, sampling, samples=samples, report=lambda share: report("sampling", share))
    loops = [one for one in found.answers if one.loop is not None]
    texts = [prompts[one.prompt] + one.text for one in loops] + list(looping)
    if len(texts) < FEWEST:
        raise InputError(
            f"{len(loops)} of {len(found.answers)} answers loop; {FEWEST} texts that do are the least: take more"
            " prompts or samples, another temperature, or give looping texts"
        )
    report("features", 0.0)
    times = sampling.detector.times
    rising = repeat_features(repeats_in_texts(scope, texts, scope.check_layers(layers), times=times), features)
    chosen = [one for one in rising if one.significant]
    if not chosen:
        raise InputError(f"no feature rises significantly within the {len(texts)} texts that loop; take more of them")
    knob = [
        Intervention.add(layer=one.layer, feature=one.feature, amount=amount, unit="resid_norm").resolve(
            scope.sizes[one.layer], scope.saes[one.layer]
        )
        for one in chosen
    ]
    check = causal_check(scope, prompts, loops, knob, sampling, say=report)
    effect = {
        "causal": check.holds,
        **check.numbers(),
        "rises": [one.rise.estimate for one in chosen],
        "amount": amount,
        "answers": len(found.answers),
        "loops": len(loops),
    }
    made = f"{len(chosen)} features of the largest rise within {len(texts)} looping texts, of {scope.name}"
    return Recipe.of("repetition", scope.model, knob, scope.saes, provenance=made, effect=effect)


def causal_check(
    scope: Scope,
    prompts: Sequence[str],
    loops: Sequence[Answer],
    knob: Sequence[Intervention],
    sampling: Sampling,
    say: Callable[[str, float], None] | None = None,
) -> CausalCheck:
    """Amplify on ordinary prompts, suppress within loops, and compare each with the same unsteered.

    The draws are not those by which the loops were found.

    Args:
        loops: answers to these prompts that loop; two at least.

    Raises:
        InputError: fewer loops.
    """
    report = say or (lambda stage, share: None)
    if len(loops) < 2:
        raise InputError(f"to see what suppressing does takes at least two loops, not {len(loops)}")
    fresh = replace(sampling, seed=sampling.seed + 1)
    against = [one.with_amount(-one.amount) for one in knob]
    begun = []
    for one in loops:
        assert one.loop is not None
        kept = list(one.ids[: one.loop.start + KEPT_TURNS * one.loop.period])
        begun.append(prompts[one.prompt] + str(scope.tokenizer.decode(kept)))
    sides: list[LoopShare] = []
    for i, (asked, steered) in enumerate(((prompts, ()), (prompts, knob), (begun, ()), (begun, against))):
        report("causal check", i / 4)
        sides.append(shares(scope, asked, fresh, steered))
    normal, amplified, looping, suppressed = sides
    return CausalCheck(
        normal.share,
        amplified.share,
        bootstrap(amplified.per_prompt() - normal.per_prompt()),
        looping.share,
        suppressed.share,
        bootstrap(looping.per_prompt() - suppressed.per_prompt()),
    )


def shares(
    scope: Scope,
    prompts: Sequence[str],
    sampling: Sampling,
    knob: Sequence[Intervention] = (),
    *,
    samples: int = 1,
    report: Callable[[float], None] | None = None,
) -> LoopShare:
    """The looping share of a scope's model, steered or not."""
    return loop_share(
        scope.model,
        scope.tokenizer,
        prompts,
        sampling,
        samples=samples,
        interventions=knob,
        saes=scope.saes,
        report=report,
    )

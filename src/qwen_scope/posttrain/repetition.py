"""Which features carry endless repetition in a model, checked causally, as a recipe that RL steers with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from qwen_scope.errors import InputError
from qwen_scope.features import RepeatFeature, repeat_features, repeats_in_texts
from qwen_scope.scope import Scope
from qwen_scope.stats import Interval, bootstrap
from qwen_scope.steer import Intervention, Recipe

from .loops import Answer, LoopShare, Sampling, loop_share

FEWEST = 5
"""Fewer looping texts than this say nothing about features."""

SCREENED = 128
"""On at most so many prompts, and on half of those there are, each candidate is tried alone."""

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
    amount: float = 0.25,
    candidates: int = 32,
    samples: int = 1,
    sampling: Sampling | None = None,
    looping: Sequence[str] = (),
    say: Callable[[str, float], None] | None = None,
) -> Recipe:
    """Sample answers, take the features that rise within those that loop and drive looping, and check what they do.

    A feature's rise is its activation at the last occurrence of a token less that at the first, so that the token is
    the same; candidates are those of the largest rise that is significant (`qwen_scope.features.repeat_features`). What
    rises may follow repetition and not drive it, so each candidate is amplified alone, and those that make most answers
    loop are taken. The check of them together is made on other prompts.

    Args:
        prompts: as the model reads them, up to where the answer begins.
        layers: to choose among; None for all that have an SAE.
        features: how many in all.
        amount: of each, in median residual norms of its layer. A small one finds features that set off the model's own
            loops; under a large one any feature of a single token makes a row of that token.
        candidates: how many are tried alone; as many as `features` tries none.
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
    changes = repeats_in_texts(scope, texts, scope.check_layers(layers), times=times)
    rising = repeat_features(changes, max(features, candidates), believed_only=True)
    if not rising:
        raise InputError(f"no feature rises significantly within the {len(texts)} texts that loop; take more of them")
    tried = min(SCREENED, len(prompts) // 2)
    amplified = [amplifying(scope, one, amount) for one in rising]
    if len(rising) > features:
        alone = drives(scope, prompts[:tried], amplified, sampling, report)
        best = np.argsort(-alone, kind="stable")[:features].tolist()
        rising, amplified = [rising[i] for i in best], [amplified[i] for i in best]
    check = causal_check(scope, prompts[tried:], begun(scope, prompts, loops), amplified, sampling, say=report)
    effect = {
        "causal": check.holds,
        **check.numbers(),
        "rises": [one.rise.estimate for one in rising],
        "amount": amount,
        "answers": len(found.answers),
        "loops": len(loops),
    }
    made = f"{len(rising)} features that rise within {len(texts)} looping texts and raise looping, of {scope.name}"
    return Recipe.of("repetition", scope.model, amplified, scope.saes, provenance=made, effect=effect)


def amplifying(scope: Scope, feature: RepeatFeature, amount: float) -> Intervention:
    """The addition of a feature by so many median residual norms, in raw units."""
    layer = feature.layer
    one = Intervention.add(layer=layer, feature=feature.feature, amount=amount, unit="resid_norm")
    return one.resolve(scope.sizes[layer], scope.saes[layer])


def drives(
    scope: Scope,
    prompts: Sequence[str],
    candidates: Sequence[Intervention],
    sampling: Sampling,
    say: Callable[[str, float], None],
) -> np.ndarray:
    """The looping share of answers to these prompts under each candidate alone; all draw alike."""
    fresh, found = replace(sampling, seed=sampling.seed + 2), []
    for i, one in enumerate(candidates):
        say("candidates", i / len(candidates))
        found.append(shares(scope, prompts, fresh, [one]).share.estimate)
    return np.array(found)


def begun(scope: Scope, prompts: Sequence[str], loops: Sequence[Answer]) -> list[str]:
    """Prompts whose answers loop, each with its answer up to the second turn of the loop."""
    out = []
    for one in loops:
        assert one.loop is not None
        kept = list(one.ids[: one.loop.start + KEPT_TURNS * one.loop.period])
        out.append(prompts[one.prompt] + str(scope.tokenizer.decode(kept)))
    return out


def causal_check(
    scope: Scope,
    prompts: Sequence[str],
    loops: Sequence[str],
    knob: Sequence[Intervention],
    sampling: Sampling,
    say: Callable[[str, float], None] | None = None,
) -> CausalCheck:
    """Amplify on ordinary prompts, suppress within loops, and compare each with the same unsteered.

    The draws are not those by which the loops were found.

    Args:
        loops: texts that have begun to loop, from `begun`; two at least.

    Raises:
        InputError: fewer loops or prompts.
    """
    report = say or (lambda stage, share: None)
    if len(loops) < 2:
        raise InputError(f"to see what suppressing does takes at least two loops, not {len(loops)}")
    fresh = replace(sampling, seed=sampling.seed + 1)
    against = [one.with_amount(-one.amount) for one in knob]
    sides: list[LoopShare] = []
    for i, (asked, steered) in enumerate(((prompts, ()), (prompts, knob), (loops, ()), (loops, against))):
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

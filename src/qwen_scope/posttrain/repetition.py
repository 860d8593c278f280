"""Which features carry endless repetition in a model, checked causally, as a recipe that RL steers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from qwen_scope.errors import InputError, check_count, check_number
from qwen_scope.features import attribute
from qwen_scope.report import Progress
from qwen_scope.scope import Scope
from qwen_scope.stats import Interval, bootstrap
from qwen_scope.steer import Intervention, Recipe
from qwen_scope.text import Corpus, only_text, usable

from .data import RepetitionRun
from .loops import Answer, LoopShare, loop_share
from .sampling import Detector, Loop, Sampling
from .sources import read_rows

FEWEST = 5
"""Fewer looping texts than this say nothing about features."""

AMOUNTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.35)
"""In median residual norms of a layer: amounts that are tried, in this order, where none is given. Large ones break an
answer rather than make it loop."""

ENOUGH = 0.5
"""The first amount under which this share of answers loops is taken."""

TRIED = 128
"""Amounts are tried on at most this many prompts, and on at most half of those given."""

ONSETS = 256
"""At most this many turns of loops are read to find the features that make a turn begin."""

KEPT_TURNS = 2
"""So many turns of a loop stand before an answer that is continued to see whether the loop goes on; and features are
sought that make the turn after the first, and so on up to here, begin."""

Looping = tuple[list[int], Loop]
"""Token ids that end in a loop, and the loop in them."""


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


def repetition(scope: Scope, run: RepetitionRun, *, progress: Progress | None = None) -> Recipe:
    """Read the prompts, and make the recipe of what makes answers to them repeat themselves.

    Args:
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        as `repetition_recipe`, and whatever reading raises.
    """
    rows = read_rows(run.source, run.reading, None, run.n, scope.name)
    texts = usable(Corpus(run.looping), only_text) if run.looping else []
    prompts = [row["prompt"] for row in rows]
    return repetition_recipe(
        scope, prompts, layers=run.layers, features=run.features, amount=run.amount, samples=run.samples,
        sampling=run.sampling, looping=texts, progress=progress,
    )  # fmt: skip


def repetition_recipe(
    scope: Scope,
    prompts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    features: int = 8,
    amount: float | None = None,
    samples: int = 1,
    sampling: Sampling | None = None,
    looping: Sequence[str] = (),
    found: LoopShare | None = None,
    progress: Progress | None = None,
) -> Recipe:
    """Sample answers, take the features that make the turns of their loops begin, and check what they do.

    Features are ranked by their effect on the log-probability of the first token of a loop's next turn
    (`qwen_scope.features.attribute`). The published ranking, by activation at a token's last occurrence less that at
    its first (`qwen_scope.features.repeat_features`), finds what follows repetition; amplified, such features break
    answers without making them loop. The amount is the smallest that makes half of the answers loop, or else the one
    under which most do. The check is made on other prompts.

    Args:
        prompts: as the model reads them, up to where the answer begins.
        layers: to choose among; None for all that have an SAE.
        features: how many in all.
        amount: of each, in median residual norms of its layer; None tries `AMOUNTS`.
        samples: answers per prompt to look for loops in.
        looping: texts that end in a loop, prompt and answer, beside those that the model makes.
        found: answers to the prompts that are sampled already; None samples them.

    Returns:
        A recipe in raw units whose `effect` holds the figures of the check, and whether it holds.

    Raises:
        InputError: too few loops, no feature that makes them begin, a number that can't be, or what `loop_share`
            refuses.
    """
    check_count("features", features)
    check_count("samples", samples)
    if amount is not None:
        check_number("amount", amount)
    sampling, report = sampling or Sampling(), progress or (lambda stage, share, text: None)
    found = found or shares(scope, prompts, sampling, samples=samples, progress=report)
    loops = [one for one in found.answers if one.loop is not None]
    known = [*loops_of(scope, prompts, loops), *loops_in(scope, looping, sampling.detector)]
    if len(known) < FEWEST:
        raise InputError(
            f"{len(loops)} of {len(found.answers)} answers loop; {FEWEST} texts that do are the least: take more"
            " prompts or samples, another temperature, or give looping texts"
        )
    report("features", 0.0, "")
    chosen = beginning(scope, known, scope.check_layers(layers), features)
    if not chosen:
        raise InputError(f"no feature makes the turns of these {len(known)} loops begin")
    tried = min(TRIED, len(prompts) // 2)
    added, interventions = amount_of(scope, prompts[:tried], chosen, amount, sampling, report)
    check = causal_check(scope, prompts[tried:], begun(scope, known), interventions, sampling, progress=report)
    effect = {
        "causal": check.holds,
        **check.numbers(),
        "effects": [one.effect for one in chosen],
        "amount": added,
        "answers": len(found.answers),
        "loops": len(loops),
    }
    made = f"{len(chosen)} features that make the turns of {len(known)} loops begin, of {scope.name}"
    return Recipe.of(
        "repetition", scope.model, interventions, scope.saes, provenance=made, effect=effect, counted=scope.counted
    )


@dataclass(frozen=True)
class Driver:
    """A feature and its mean effect on the log-probability that a loop's next turn begins, in nats."""

    layer: int
    feature: int
    effect: float


def loops_of(scope: Scope, prompts: Sequence[str], loops: Sequence[Answer]) -> list[Looping]:
    """Prompts and the answers to them that loop, as tokens."""
    out = []
    for one in loops:
        assert one.loop is not None
        asked = scope.tokenize([prompts[one.prompt]]).input_ids[0].tolist()
        out.append(([*asked, *one.ids], replace(one.loop, start=one.loop.start + len(asked))))
    return out


def loops_in(scope: Scope, texts: Sequence[str], detector: Detector) -> list[Looping]:
    """Those of some texts that end in a loop, as tokens."""
    read = [scope.tokenize([text], truncate=True).input_ids[0].tolist() for text in texts]
    found = [(ids, detector.find(ids)) for ids in read]
    return [(ids, loop) for ids, loop in found if loop is not None]


def beginning(scope: Scope, loops: Sequence[Looping], layers: Sequence[int], n: int) -> list[Driver]:
    """The features that make turns of loops begin, over all layers, largest effect first."""
    turns = range(1, KEPT_TURNS + 1)
    onsets = [ids[: loop.start + turn * loop.period + 1] for turn in turns for ids, loop in loops]
    step = -(-len(onsets) // ONSETS)
    found = [
        Driver(layer, feature, float(effects[feature]))
        for layer, effects in attribute(scope, onsets[::step], layers).items()
        for feature in effects.topk(min(n, len(effects))).indices.tolist()
    ]
    return sorted((one for one in found if one.effect > 0), key=lambda one: -one.effect)[:n]


def amount_of(
    scope: Scope,
    prompts: Sequence[str],
    drivers: Sequence[Driver],
    amount: float | None,
    sampling: Sampling,
    progress: Progress,
) -> tuple[float, list[Intervention]]:
    """The amount of each feature, and their addition by it in raw units."""
    amounts = AMOUNTS if amount is None else (amount,)
    candidates = [[amplifying(scope, one, each) for one in drivers] for each in amounts]
    if len(candidates) == 1:
        return amounts[0], candidates[0]
    fresh, looping = replace(sampling, seed=sampling.seed + 2), []
    for i, interventions in enumerate(candidates):
        progress("amounts", i / len(candidates), f"{amounts[i]:g} median norms")
        looping.append(shares(scope, prompts, fresh, interventions).share.estimate)
        if looping[-1] >= ENOUGH:
            break
    best = int(np.argmax(looping))
    return amounts[best], candidates[best]


def amplifying(scope: Scope, driver: Driver, amount: float) -> Intervention:
    """The addition of a feature by an amount in median residual norms, in raw units."""
    layer = driver.layer
    one = Intervention.add(layer=scope.hook_point(layer), feature=driver.feature, amount=amount, unit="resid_norm")
    return one.resolve(scope.stats[layer], scope.saes[layer])


def begun(scope: Scope, loops: Sequence[Looping]) -> list[str]:
    """The texts of loops, each up to its second turn."""
    return [str(scope.tokenizer.decode(ids[: loop.start + KEPT_TURNS * loop.period])) for ids, loop in loops]


def causal_check(
    scope: Scope,
    prompts: Sequence[str],
    loops: Sequence[str],
    interventions: Sequence[Intervention],
    sampling: Sampling,
    progress: Progress | None = None,
) -> CausalCheck:
    """Amplify on ordinary prompts, suppress within loops, and compare each with the same unsteered.

    The draws are not those by which the loops were found.

    Args:
        loops: texts that have begun to loop, from `begun`; two at least.

    Raises:
        InputError: fewer loops or prompts.
    """
    report = progress or (lambda stage, share, text: None)
    if len(loops) < 2:
        raise InputError(f"to see what suppressing does takes at least two loops, not {len(loops)}")
    fresh = replace(sampling, seed=sampling.seed + 1)
    against = [one.with_amount(-one.amount) for one in interventions]
    sides: list[LoopShare] = []
    for i, (asked, steered) in enumerate(((prompts, ()), (prompts, interventions), (loops, ()), (loops, against))):
        report("causal check", i / 4, "")
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
    interventions: Sequence[Intervention] = (),
    *,
    samples: int = 1,
    progress: Progress | None = None,
) -> LoopShare:
    """The looping share of a scope's model, steered or not."""
    return loop_share(
        scope.model,
        scope.tokenizer,
        prompts,
        sampling,
        samples=samples,
        interventions=interventions,
        saes=scope.saes,
        progress=progress,
    )

"""`qwen-scope validate`: the verdict on a knob."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options, output, steer, sweep

if TYPE_CHECKING:
    from qwen_scope.features import Verdict


def validate(
    prompts: sweep.Prompts,
    positive: Annotated[Path, typer.Option("--positive", help="Texts with the property, one per line.")],
    negative: Annotated[Path, typer.Option("--negative", help="Texts without it, one per line.")],
    unrelated: Annotated[Path, typer.Option("--unrelated", help="Texts that have nothing to do with it.")],
    amount: Annotated[float, typer.Option("--amount", help="The amount that sweep proposes, in --unit.")] = 1.0,
    model: options.Model = "lab",
    sae: options.Sae = None,
    layer: steer.Layer = None,
    feature: steer.Feature = None,
    unit: steer.Unit = "resid_norm",
    where: steer.Where = "all",
    recipe: steer.RecipeFile = None,
    regex: sweep.Regex = None,
    script: sweep.Script = None,
    target_feature: sweep.OtherFeature = None,
    lower: Annotated[bool, typer.Option("--lower", help="The feature is said to lower the target.")] = False,
    n_random: Annotated[int, typer.Option("--random", help="How many matched random features.")] = 19,
    max_new_tokens: steer.NewTokens = 40,
    sample: steer.Sample = False,
    temperature: steer.Temperature = None,
    seed: steer.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    k: options.K = None,
    as_json: options.Json = False,
) -> None:
    """Say whether a feature is a knob: causal, correlated only, entangled, or no effect.

    The same prompts run under the feature, matched random features, the opposite sign, a difference of means, shuffled
    labels and prompting alone; the rules are printed with what was found.
    """
    from qwen_scope.errors import InputError
    from qwen_scope.features import Examples
    from qwen_scope.features import validate as run_validate
    from qwen_scope.steer import Continuations, Decoding

    decoding = Decoding(max_new_tokens, sample, temperature, seed=seed)
    one = None if recipe is not None else steer.one_intervention(layer, feature, "add", amount, unit, where)
    lines = [tuple(sweep.read_prompts(path)) for path in (prompts, positive, negative, unrelated)]
    with output.status("opening the model"):
        scope = options.open_scope(model, sae, device, dtype, k)
    target = sweep.chosen_target(scope, regex, script, None, target_feature)
    if isinstance(target, Continuations):
        raise InputError("a verdict needs a target that reads texts")
    knob = steer.from_recipe(scope, recipe) if recipe is not None else [one] if one is not None else []
    with sweep.bar() as report:
        verdict = run_validate(
            scope,
            knob,
            target,
            lines[0],
            Examples(*lines[1:]),
            lower=lower,
            n_random=n_random,
            decoding=decoding,
            seed=seed,
            report=report,
        )
    if as_json:
        output.print_json(verdict.to_json())
    else:
        print_verdict(verdict)


def print_verdict(verdict: Verdict) -> None:
    """The word, the rules with what was found, the arms, and what else moved."""
    from rich.text import Text

    out = output.console()
    out.print(Text(f"Verdict: {verdict.outcome}", style="bold"))
    for reason in verdict.reasons:
        out.print(Text(f"  {reason}"))
    out.print()
    rows = [
        (arm.name, arm.effect.estimate, f"{arm.effect.low:.3g} to {arm.effect.high:.3g}", arm.perplexity)
        for arm in verdict.arms
    ]
    columns = ("generated under", "target", "95% interval", "perplexity")
    output.show("The target under each, with the perplexity under the unsteered model", columns, rows)
    side = verdict.side
    out.print(
        f"On unrelated text: KL {side.kl}, under the difference of means {side.kl_of_direction}, loss {side.loss}"
    )
    moved = [(m.layer, m.feature, m.before, m.after) for m in side.moved]
    output.show("Other features that the change itself moves there", ("layer", "feature", "before", "after"), moved)

"""`qwen-scope posttrain repetition` and `rl`: features of endless repetition, and rollouts steered with them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen_scope.text import CorpusOptions

from . import options, output, whose
from .groups import grouped
from .posttrain import Seed, check_packages, quiet
from .posttrain_data import check_run, given_files, read_rows

Prompts = Annotated[str, typer.Argument(metavar="PROMPTS", help="A file whose rows have a prompt, or 'lab'.")]
Number = Annotated[int, typer.Option("-n", help="So many prompts.", min=2)]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Where an answer is cut off.", min=1)]
Temperature = Annotated[float, typer.Option("--temperature", help="Of the draws.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw among the likeliest tokens that make up this share.")]
Longest = Annotated[int, typer.Option("--longest", help="A loop's block in tokens, at most.", min=1)]
Times = Annotated[int, typer.Option("--times", help="How often a loop's block stands in a row, at least.", min=2)]
Least = Annotated[int, typer.Option("--least", help="How many tokens a loop is long, at least.", min=1)]

PROMPTS = CorpusOptions(column="prompt", unit="line")


@grouped
def repetition(
    prompts: Prompts,
    out: Annotated[Path, typer.Option("--out", "-o", help="The recipe to write, .json or .yaml.")],
    model: options.Model = "lab",
    sae: options.Sae = None,
    layers: options.Layers = None,
    features: Annotated[int, typer.Option("--features", help="How many in all.", min=1)] = 8,
    amount: Annotated[
        float | None, typer.Option("--amount", help="Of each, in median residual norms. Default: enough for half.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Answers per prompt to look for loops in.", min=1)] = 1,
    looping: Annotated[
        str | None, typer.Option("--looping", help="Texts that end in a loop, beside the model's own.")
    ] = None,
    n: Number = 200,
    reading: CorpusOptions = PROMPTS,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    longest: Longest = 64,
    times: Times = 4,
    least: Least = 16,
    seed: Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    k: options.K = None,
    as_json: options.Json = False,
) -> None:
    """Find the features that make answers repeat themselves without end, and check what they do.

    Answers that loop are sampled; features are ranked by their effect on the token with which a loop's next turn
    begins, and added by the smallest amount that makes half of the answers loop. On other prompts they should make more
    answers loop, suppressed within loops fewer go on. The recipe holds the figures either way; `rl` refuses one whose
    check does not hold.
    """
    check_packages()
    from qwen_scope.files import check_output
    from qwen_scope.posttrain import Detector, Sampling, repetition_recipe
    from qwen_scope.text import Corpus, only_text, usable

    check_output(out, *given_files(prompts, looping), *options.folders(model, sae), endings=options.RECIPES)
    sampling = Sampling(max_new_tokens, temperature, top_p, Detector(longest, times, least), seed)
    asked = [row["prompt"] for row in read_rows(prompts, reading, None, n, model)]
    texts = usable(Corpus(looping), only_text) if looping else []
    with output.status("opening the model"):
        scope = options.open_scope(model, sae, device, dtype, k)
    with output.progress() as bar:
        recipe = repetition_recipe(
            scope,
            asked,
            layers=options.parse_layers(layers) if layers else None,
            features=features,
            amount=amount,
            samples=samples,
            sampling=sampling,
            looping=texts,
            say=lambda stage, share: bar(stage, share, ""),
        )
    recipe.save(out)
    effect = recipe.effect
    if as_json:
        output.print_json({"recipe": str(out), "effect": dict(effect)})
        return
    chosen = zip(recipe.interventions, effect["effects"], strict=True)
    found = [(one.layer, one.feature, f"{nats:.3f}", f"{one.amount:.1f}") for one, nats in chosen]
    output.show(
        f"Features of {effect['loops']} looping answers", ("layer", "feature", "effect (nats)", "amount"), found
    )
    names = ("normal", "amplified", "raises", "looping", "suppressed", "lowers")
    rows = [(name, *(f"{effect[name][key]:.1%}" for key in ("estimate", "low", "high"))) for name in names]
    output.show("Share of answers that loop", ("", "share", "low", "high"), rows)
    output.console().print(f"The check {'holds' if effect['causal'] else 'does not hold'}. Written to {out}.")


@grouped
def rl(
    prompts: Prompts,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the run.")],
    method: Annotated[
        str, typer.Option("--method", help="steered, vanilla, or random (features of equal frequency and length).")
    ] = "steered",
    recipe: Annotated[Path | None, typer.Option("--recipe", help="What `repetition` has written.")] = None,
    reward: Annotated[
        str | None, typer.Option("--reward", help="lab, answer, language or module:function. Default: lab or answer.")
    ] = None,
    model: options.Model = "lab",
    sae: options.Sae = None,
    unchecked: Annotated[bool, typer.Option("--unchecked", help="Take a recipe whose check does not hold.")] = False,
    held_out: Annotated[str | None, typer.Option("--held-out", help="Prompts to measure loops on.")] = None,
    n: Number = 1000,
    held_out_n: Annotated[int, typer.Option("--held-out-n", help="So many of them.", min=2)] = 200,
    reading: CorpusOptions = PROMPTS,
    answer_column: Annotated[
        str, typer.Option("--answer-column", help="The right answer, for that reward.")
    ] = "answer",
    group: Annotated[int, typer.Option("--group", help="Answers per prompt.", min=2)] = 8,
    per_step: Annotated[int, typer.Option("--prompts", help="Prompts per step.", min=1)] = 8,
    micro: Annotated[int, typer.Option("--micro", help="Answers per forward pass.", min=1)] = 8,
    steps: Annotated[int, typer.Option("--steps", help="Optimiser steps.", min=1)] = 200,
    updates: Annotated[int, typer.Option("--updates", help="Of the weights per answer.", min=1)] = 1,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 1e-6,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps.", min=0)] = 0,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    longest: Longest = 64,
    times: Times = 4,
    least: Least = 16,
    lora: Annotated[int | None, typer.Option("--lora", help="Rank of adapters instead of all weights.")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute to save memory.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    save_every: Annotated[int, typer.Option("--save-every", help="Steps between checkpoints; 0 for none.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    seed: Seed = 42,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    as_json: options.Json = False,
) -> None:
    """Reinforcement learning with DAPO's loss; one answer of each group is generated under steering.

    The reward is the ordinary one and the policy that scores the answers is unsteered. The result lies in OUT/model.
    """
    given = locals()
    check_packages()
    from qwen_scope.posttrain import Detector, RLRun, run_rl
    from qwen_scope.steer import load_recipe

    quiet()
    check_run(out, model, sae, prompts, held_out, recipe)
    reward = reward or ("lab" if prompts == "lab" else "answer")
    run = RLRun(
        **options.same_named(RLRun, given)
        | {"reward": reward, "prompts": per_step, "detector": Detector(longest, times, least)}
    )
    unused = Counter[str]()
    # Whatever the seed of the training is, the prompts are the same.
    reading, rest = replace(reading, seed=0), replace(reading, sample=None, seed=1)
    rows = read_rows(prompts, reading, answer_column if reward == "answer" else None, n, model, unused=unused)
    asked = read_rows(held_out, rest, None, held_out_n, model, held_out=True) if held_out else []
    whose.say_whose()
    with output.progress() as bar:
        metrics = run_rl(
            run,
            rows,
            [row["prompt"] for row in asked],
            None if recipe is None else load_recipe(recipe),
            unused=unused,
            progress=lambda step, total, log: bar(
                "training", step / max(1, total), f"reward {log.get('reward', 0):.2f}"
            ),
        )
    if as_json:
        output.print_json({"folder": str(out), **metrics})
        return
    show_trained(metrics, method, out)


def show_trained(metrics: dict[str, Any], method: str, out: Path) -> None:
    """What came out of a run."""
    shown = [(name, f"{value:.4f}") for name, value in metrics.items() if not isinstance(value, dict)]
    shares = {name: value for name, value in metrics.items() if isinstance(value, dict)}
    shown += [(name, f"{one['estimate']:.4f} [{one['low']:.4f}, {one['high']:.4f}]") for name, one in shares.items()]
    output.show(f"Trained ({method})", ("figure", "value"), shown)
    output.console().print(f"Written to {out / 'model'}.", soft_wrap=True)

"""`qwen-scope steer`: the same prompt with and without a change of the residual stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_scope.errors import InputError

from . import options, output

if TYPE_CHECKING:
    from qwen_scope.scope import Scope
    from qwen_scope.steer import Decoding, Generation, Intervention
    from qwen_scope.text import Chat

Layer = Annotated[int | None, typer.Option("--layer", help="The layer of the feature.")]
Feature = Annotated[int | None, typer.Option("--feature", help="The feature's index.")]
Op = Annotated[str, typer.Option("--op", help="add, scale, clamp, floor, cap or ablate.")]
Unit = Annotated[str, typer.Option("--unit", help="raw, resid_norm (lengths of the layer's residual) or max_act.")]
Where = Annotated[
    str,
    typer.Option(
        "--where", help="all, prompt, generated, positions (0,2,5-8), phases (thinking, prompt:user), or several."
    ),
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="Apply a saved recipe (.json or .yaml) instead.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="The most tokens to generate.")]
Sample = Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="With --sample. Default: the model's own.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="With --sample. Default: the model's own.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="With --sample. Default: the model's own.")]
Penalty = Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1 discourages repetition.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the draws.", **options.SEED)]


def steer(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads standard input.")],
    model: options.Model = "lab",
    sae: options.Sae = None,
    layer: Layer = None,
    feature: Feature = None,
    op: Op = "add",
    amount: Annotated[float | None, typer.Option("--amount", help="How much, in --unit; not for ablate.")] = None,
    unit: Unit = "resid_norm",
    where: Where = "all",
    recipe: RecipeFile = None,
    save_recipe: Annotated[Path | None, typer.Option("--save-recipe", help="Save what was applied.")] = None,
    chat: options.Chat = None,
    max_new_tokens: NewTokens = 100,
    sample: Sample = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    candidates: Annotated[int, typer.Option("--candidates", help="Likeliest tokens to keep in JSON.", min=0)] = 10,
    stream: Annotated[bool, typer.Option("--stream", help="Only the steered text, while it grows.")] = False,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    k: options.K = None,
    as_json: options.Json = False,
) -> None:
    """Generate with one feature changed, or with a recipe, beside the unsteered model.

    The amount of `add` and `clamp` counts in lengths of the layer's typical residual unless --unit says otherwise;
    `sweep` finds a good one.
    """
    from qwen_scope.files import check_output
    from qwen_scope.steer import Decoding

    if save_recipe is not None:
        check_output(save_recipe, *([recipe] if recipe else []), *options.folders(model, sae), endings=options.RECIPES)
    mode = options.check_chat(chat)
    decoding = Decoding(max_new_tokens, sample, temperature, top_p, top_k, repetition_penalty, seed)
    one = None if recipe is not None else one_intervention(layer, feature, op, amount, unit, where)
    if recipe is not None and feature is not None:
        raise InputError("--recipe says what to change; leave --feature away")
    if stream and as_json:
        raise InputError("--stream and --json exclude each other")
    prompt = options.typed_or_piped(prompt)
    with output.status("opening the model"):
        scope = options.open_scope(model, sae, device, dtype, k)
    interventions = from_recipe(scope, recipe) if recipe is not None else placed(scope, one)
    if save_recipe is not None:
        from qwen_scope.steer import Recipe

        Recipe.of(save_recipe.stem, scope.model, interventions, scope.saes).save(save_recipe)
    if stream:
        stream_text(scope, prompt, interventions, decoding, mode)
        return
    show_sides(scope, prompt, interventions, decoding, mode, candidates, as_json)


def show_sides(
    scope: Scope,
    prompt: str,
    interventions: list[Intervention],
    decoding: Decoding,
    mode: Chat | None,
    candidates: int,
    as_json: bool,
) -> None:
    """Both runs, each token on a background as strong as its probability."""
    with output.status("generating"):
        kept = candidates if as_json else 0
        steered = scope.generate(prompt, interventions, decoding=decoding, chat=mode, candidates=kept)
        plain = scope.generate(prompt, decoding=decoding, chat=mode, candidates=kept)
    if as_json:
        applied = [i.to_json() for i in interventions]
        output.print_json({"interventions": applied, "unsteered": plain, "steered": steered})
        return
    from rich.text import Text

    out = output.console()
    for title, side in (("Unsteered", plain), ("Steered", steered)):
        out.print(Text(f"{title} (shaded by the probability of each token)", style="bold"))
        out.print(shaded_tokens(side))
        out.print()


def shaded_tokens(side: Generation) -> Any:
    """The continuation as shaded text."""
    from qwen_scope.report import shaded

    return shaded([t.text for t in side.tokens], [t.probability or 0.0 for t in side.tokens], 1.0)


def stream_text(
    scope: Scope,
    prompt: str,
    interventions: list[Intervention],
    decoding: Decoding,
    mode: Chat | None,
) -> None:
    """The steered continuation, piece by piece."""
    from qwen_scope.steer import generate, stream

    tools = {"saes": scope.saes, "stats": scope.stats, "decoding": decoding, "chat": mode}
    for _, piece in stream(
        lambda on_text: generate(scope.model, scope.tokenizer, [prompt], interventions, on_text=on_text, **tools)
    ):
        output.write(piece)
    output.write("\n")


def one_intervention(
    layer: int | None, feature: int | None, op: str, amount: float | None, unit: str, where: str
) -> Intervention:
    """The intervention that the options describe.

    Raises:
        InputError: something is missing, or they mean nothing together.
    """
    from qwen_scope.steer import Intervention

    if layer is None or feature is None:
        raise InputError("name what to change: --layer and --feature, or --recipe")
    if op == "ablate":
        if amount is not None:
            raise InputError("ablating a feature has no amount; to keep a share of it, use --op scale")
        amount, unit = 0.0, "raw"
    elif amount is None:
        raise InputError(f"--op {op} needs an --amount")
    elif op == "scale":
        unit = "raw"
    data = {"hook_point": f"layer{layer}", "op": op, "feature": feature, "amount": amount, "unit": unit, "where": where}
    return Intervention.from_json(data)


def placed(scope: Scope, one: Intervention | None) -> list[Intervention]:
    """The intervention that the options describe, where the SAE of its layer reads."""
    return [] if one is None else [one.at(scope.hook_point(one.layer))]


def from_recipe(scope: Scope, path: Path) -> list[Intervention]:
    """The interventions of a recipe that fits the scope."""
    from qwen_scope.steer import load_recipe

    found = load_recipe(path)
    found.check(scope.model, scope.saes)
    return list(found.interventions)

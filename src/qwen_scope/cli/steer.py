"""`qwen-scope steer`: the same prompt with and without a change of the residual stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_scope.errors import InputError
from qwen_scope.features import ChangeOptions
from qwen_scope.scope import ScopeOptions
from qwen_scope.steer import Decoding

from . import changes, names, options, output, tables
from .groups import grouped

if TYPE_CHECKING:
    from qwen_scope.scope import Scope
    from qwen_scope.steer import Generation, Intervention
    from qwen_scope.text import Chat


@grouped
def steer(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads standard input.")],
    change: ChangeOptions = changes.CHANGE,
    save_recipe: Annotated[Path | None, typer.Option("--save-recipe", help="Save what was applied.")] = None,
    chat: options.Chat = None,
    decoding: Decoding = changes.DECODING,
    candidates: Annotated[int, typer.Option("--candidates", help="Most probable tokens in JSON.", min=0)] = 10,
    stream: Annotated[bool, typer.Option("--stream", help="Only the steered text, while it grows.")] = False,
    asked: ScopeOptions = changes.SCOPE,
    as_json: options.Json = False,
) -> None:
    """Generate with one feature changed, or with a recipe, beside the unsteered model.

    The amount of `add`, `clamp`, `floor` and `cap` counts in lengths of the layer's typical residual unless --unit says
    otherwise; `sweep` finds a good one.
    """
    from qwen_scope.features import check_change, interventions_of, sinks_changed
    from qwen_scope.files import check_output

    if save_recipe is not None:
        given = [change.recipe] if change.recipe else []
        check_output(save_recipe, *given, *options.folders_of(asked), endings=options.RECIPES)
    mode = options.check_chat(chat)
    check_change(change)
    if stream and as_json:
        raise InputError("--stream and --json exclude each other")
    prompt = options.typed_or_piped(prompt)
    scope = options.open_asked(asked)
    interventions = interventions_of(scope, change)
    for sentence in sinks_changed(scope, prompt, interventions, mode):
        output.say(f"qwen-scope: {sentence}")
    if save_recipe is not None:
        from qwen_scope.steer import Recipe

        Recipe.of(save_recipe.stem, scope.model, interventions, scope.saes, counted=scope.counted).save(save_recipe)
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
        called = names.of_changes(interventions)
        more = {"names": called} if called else {}
        output.print_json({"interventions": applied, **more, "unsteered": plain, "steered": steered})
        return
    from rich.text import Text

    from qwen_scope.report import Table

    both = {"unsteered": plain, "steered": steered}
    tokens = [
        {"run": run, "position": i, "token": t.text, "probability": t.probability}
        for run, side in both.items()
        for i, t in enumerate(side.tokens)
    ]
    tables.keep(Table.of("Continuations", tokens, ("run", "position", "token", "probability")))
    out = output.console()
    output.show_changes(interventions)
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

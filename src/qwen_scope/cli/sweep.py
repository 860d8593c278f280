"""`qwen-scope sweep`: dose and response of a feature or a recipe, and a proposed amount."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.errors import InputError
from qwen_scope.features import ChangeOptions, SweepOptions, TargetOptions
from qwen_scope.scope import ScopeOptions
from qwen_scope.steer import Decoding
from qwen_scope.text import CorpusOptions

from . import changes, documents, names, options, output
from .groups import LINES, grouped

if TYPE_CHECKING:
    from qwen_scope.features import Sweep

Prompts = Annotated[
    str, typer.Argument(help="Prompts: a .txt file with one per line, or any other corpus, as extract reads it.")
]
Recipes = Annotated[
    list[Path] | None, typer.Option("--recipe", help="A saved recipe instead; of several the best is proposed.")
]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference", help="Texts, read like prompts, whose perplexity the budget counts from. Default: unsteered."
    ),
]

LAB_PROMPTS = 100
"""How many texts of the lab are prompts."""


@partial(grouped, without=["reading.unit", "reading.sample", "reading.seed", "change.amount", "change.recipe"])
def sweep(
    prompts: Prompts,
    asked: ScopeOptions = changes.SCOPE,
    change: ChangeOptions = changes.CHANGE,
    recipe: Recipes = None,
    aim: TargetOptions = changes.TARGET,
    sweeping: SweepOptions = changes.SWEEP,
    reference: Reference = None,
    save_recipe: Annotated[Path | None, typer.Option("--save-recipe", help="Save the proposal (.json, .yaml).")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a figure (.png).")] = None,
    chat: options.Chat = None,
    reading: CorpusOptions = LINES,
    decoding: Decoding = changes.FORTY,
    as_json: options.Json = False,
) -> None:
    """Try a grid of amounts: what each does to the target, and what it costs in fluency.

    The grid is in lengths of the layer's typical residual; --amounts multiply the amounts of a recipe. The proposal
    is the amount with the largest effect whose perplexity (under the unsteered model) and repetition keep the budget.
    """
    from qwen_scope.features import (
        best_candidate,
        check_change,
        interventions_of,
        plot_sweep,
        proposal,
        recipes_by_name,
        scored_rows,
        sweep_candidates,
        target_of,
    )

    given = [prompts, reference, *(recipe or []), asked.model, asked.sae, asked.adapter]
    check_outputs(save_recipe, plot, options.folders(*given))
    mode = options.check_chat(chat)
    one = replace(change, amount=None if change.op == "ablate" else 1.0)
    if not recipe:
        check_change(one)
    lines, texts = read_prompts(prompts, reading), read_prompts(reference, reading) if reference is not None else []
    scope = options.open_asked(asked)
    target = target_of(scope, aim)
    candidates = recipes_by_name(scope, recipe) if recipe else {"feature": interventions_of(scope, one)}
    with output.progress() as progress:
        found = sweep_candidates(
            scope,
            lines,
            candidates,
            target,
            sweeping,
            decoding=decoding,
            chat=mode,
            reference=scored_rows(scope, texts),
            progress=progress,
        )
    best = best_candidate(found)
    shown = best or next(iter(found))
    if plot is not None:
        plot_sweep(found[shown], plot)
    if save_recipe is not None:
        proposal(scope, save_recipe.stem, found[shown], provenance="qwen-scope sweep").save(save_recipe)
    if as_json:
        several = {"best": best, "candidates": {name: each.to_json() for name, each in found.items()}}
        called = names.of_changes(one for some in candidates.values() for one in some)
        more = {"n_prompts": len(lines)} | ({"names": called} if called else {})
        output.print_json((several if len(found) > 1 else found[shown].to_json()) | more)
    else:
        output.show_changes(one for some in candidates.values() for one in some)
        print_sweeps(found, best)


def check_outputs(save_recipe: Path | None, plot: Path | None, given: list[str | Path]) -> None:
    """Refuse names that can't be written before anything is computed."""
    from qwen_scope.files import check_output

    if save_recipe is not None:
        check_output(save_recipe, *given, endings=options.RECIPES)
    if plot is not None:
        check_output(plot, *given, endings=[".png"])


def print_sweeps(found: dict[str, Sweep], best: str | None) -> None:
    """The table of every candidate, and which is best."""
    for name, one in found.items():
        print_sweep(one, name if len(found) > 1 else "")
    if len(found) > 1 and best is not None:
        output.console().print(f"Best: {best}.")


def print_sweep(found: Sweep, name: str = "") -> None:
    """The table and the proposal in one sentence."""
    columns = ("amount", "effect", "95% interval", "perplexity", "repetition", "KL", "in budget")
    rows = [
        (
            dose.amount,
            dose.effect.estimate,
            f"{dose.effect.low:.3g} to {dose.effect.high:.3g}",
            dose.perplexity,
            dose.repetition,
            dose.kl,
            "yes" if dose.fits else "no",
        )
        for dose in found.doses
    ]
    title = f"Dose and response{f' of {name}' if name else ''}"
    output.show(f"{title}; the budget counts from a perplexity of {found.reference:.4g}", columns, rows)
    out = output.console()
    if found.best is None:
        out.print("No amount inside the budget does better than the unsteered model.")
    else:
        out.print(f"Proposed: {found.best.amount:g}, effect {found.best.effect}.")


def read_prompts(source: str | Path, reading: CorpusOptions = LINES) -> list[str]:
    """The texts of a source; in a text file of whatever name every line is one.

    Raises:
        InputError: a conversation or nothing instead of texts, a `.txt` file that is no text.
        NotFoundError: no such file or dataset.
    """
    from qwen_scope.features import read_texts
    from qwen_scope.text import is_readable

    path = Path(source)
    if path.suffix == ".json":
        raise InputError(
            f"{path.name} is one value of JSON, not a text per line; write a row per line into a .jsonl file"
        )
    if path.is_file() and (path.suffix == ".txt" or not is_readable(path)):
        return read_texts(path)
    found = documents.texts_of(str(source), LAB_PROMPTS, replace(reading, chat=None))
    return [text for text in found if isinstance(text, str)]

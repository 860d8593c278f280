"""`qwen-scope sweep`: dose and response of a feature or a recipe, and a proposed amount."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.errors import InputError
from qwen_scope.text import CorpusOptions

from . import documents, options, output, steer, targets
from .groups import LINES, grouped

if TYPE_CHECKING:
    from qwen_scope.scope import Scope
    from qwen_scope.steer import Intervention, Row, Sweep

Prompts = Annotated[
    str, typer.Argument(help="Prompts: a .txt file with one per line, or any other corpus, as extract reads it.")
]
Recipes = Annotated[
    list[Path] | None, typer.Option("--recipe", help="A saved recipe instead; of several the best is proposed.")
]
Tolerance = Annotated[
    float, typer.Option("--tolerance", help="Propose a smaller amount whose effect is this close to the largest.")
]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference", help="Texts, read like prompts, whose perplexity the budget counts from. Default: unsteered."
    ),
]

LAB_PROMPTS = 100
"""So many texts of the lab are prompts."""


@partial(grouped, without=["unit", "sample", "seed"])
def sweep(
    prompts: Prompts,
    model: options.Model = "lab",
    sae: options.Sae = None,
    layer: steer.Layer = None,
    feature: steer.Feature = None,
    op: steer.Op = "add",
    unit: steer.Unit = "resid_norm",
    where: steer.Where = "all",
    recipe: Recipes = None,
    regex: targets.Regex = None,
    script: targets.Script = None,
    continuation: targets.Continuation = None,
    target_feature: targets.OtherFeature = None,
    rule: targets.Rule = None,
    amounts: Annotated[str | None, typer.Option("--amounts", help="The grid: 0.2,0.5,1. Default: 0.1 to 1.6.")] = None,
    lower: Annotated[bool, typer.Option("--lower", help="Lower the target instead of raising it.")] = False,
    max_perplexity: Annotated[float, typer.Option("--max-perplexity", help="Budget: times the unsteered.")] = 2.0,
    max_repetition: Annotated[float, typer.Option("--max-repetition", help="Budget: added to the unsteered.")] = 0.1,
    tolerance: Tolerance = 0.0,
    reference: Reference = None,
    save_recipe: Annotated[Path | None, typer.Option("--save-recipe", help="Save the proposal (.json, .yaml).")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a figure (.png).")] = None,
    chat: options.Chat = None,
    reading: CorpusOptions = LINES,
    max_new_tokens: steer.NewTokens = 40,
    sample: steer.Sample = False,
    temperature: steer.Temperature = None,
    seed: steer.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    k: options.K = None,
    as_json: options.Json = False,
) -> None:
    """Try a grid of amounts: what each does to the target, and what it costs in fluency.

    The grid is in lengths of the layer's typical residual; --amounts multiply the amounts of a recipe. The proposal
    is the amount with the largest effect whose perplexity (under the unsteered model) and repetition keep the budget.
    """
    from qwen_scope.steer import Budget, Decoding, best_candidate, plot_sweep, sweep_candidates

    check_outputs(save_recipe, plot, options.folders(prompts, reference, *(recipe or []), model, sae))
    mode = options.check_chat(chat)
    decoding = Decoding(max_new_tokens, sample, temperature, seed=seed)
    budget = Budget(max_perplexity, max_repetition, tolerance)
    grid = None if amounts is None else parse_amounts(amounts)
    one = None if recipe else steer.one_intervention(layer, feature, op, None if op == "ablate" else 1, unit, where)
    lines, texts = read_prompts(prompts, reading), read_prompts(reference, reading) if reference is not None else []
    with output.status("opening the model"):
        scope = options.open_scope(model, sae, device, dtype, k)
    target = targets.chosen_target(scope, regex, script, continuation, target_feature, rule)
    candidates = from_recipes(scope, recipe) if recipe else {"feature": steer.placed(scope, one)}
    with output.progress() as report:
        found = sweep_candidates(
            scope.model,
            scope.tokenizer,
            lines,
            candidates,
            target,
            amounts=grid,
            lower=lower,
            saes=scope.saes,
            stats=scope.stats,
            decoding=decoding,
            chat=mode,
            budget=budget,
            reference=rows_to_score(scope, texts),
            report=report,
        )
    best = best_candidate(found)
    shown = best or next(iter(found))
    if plot is not None:
        plot_sweep(found[shown], plot)
    if save_recipe is not None:
        save_proposal(scope, save_recipe, found[shown], candidates[shown])
    if as_json:
        several = {"best": best, "candidates": {name: each.to_json() for name, each in found.items()}}
        output.print_json((several if len(found) > 1 else found[shown].to_json()) | {"n_prompts": len(lines)})
    else:
        print_sweeps(found, best)


def check_outputs(save_recipe: Path | None, plot: Path | None, given: list[str | Path]) -> None:
    """Refuse names that can't be written before anything is computed."""
    from qwen_scope.files import check_output

    if save_recipe is not None:
        check_output(save_recipe, *given, endings=options.RECIPES)
    if plot is not None:
        check_output(plot, *given, endings=[".png"])


def from_recipes(scope: Scope, paths: list[Path]) -> dict[str, list[Intervention]]:
    """The interventions of every recipe, by the name of its file.

    Raises:
        InputError: two of one name.
    """
    found = {path.stem: steer.from_recipe(scope, path) for path in paths}
    if len(found) < len(paths):
        raise InputError("two recipes have the same file name, which is what tells them apart")
    return found


def print_sweeps(found: dict[str, Sweep], best: str | None) -> None:
    """The table of every candidate, and which is best."""
    for name, one in found.items():
        print_sweep(one, name if len(found) > 1 else "")
    if len(found) > 1 and best is not None:
        output.console().print(f"Best: {best}.")


def rows_to_score(scope: Scope, texts: list[str]) -> list[Row]:
    """Texts as tokens whose perplexity counts from the second token on."""
    from qwen_scope.steer import Row

    if not texts:
        return []
    tokens = scope.tokenize(texts, truncate=True)
    return [Row(tuple(ids[:n].tolist())) for ids, n in zip(tokens.input_ids, tokens.lengths, strict=True) if n > 1]


def save_proposal(scope: Scope, path: Path, found: Sweep, interventions: list[Intervention]) -> None:
    """The interventions at the proposed amount, with what was measured.

    Raises:
        InputError: nothing was proposed.
    """
    from qwen_scope.steer import Recipe

    if found.best is None:
        raise InputError("no amount inside the budget does better than the unsteered model, so there is no recipe")
    chosen = [one.with_amount(one.amount * found.best.amount) for one in interventions]
    effect = {
        "target": found.best.effect.estimate,
        "target_unsteered": found.doses[0].effect.estimate,
        "perplexity": found.best.perplexity,
        "perplexity_reference": found.reference,
        "kl": found.best.kl,
        "prompts": found.best.effect.n,
    }
    Recipe.of(path.stem, scope.model, chosen, scope.saes, provenance="qwen-scope sweep", effect=effect).save(path)


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
    from qwen_scope.text import is_readable

    path = Path(source)
    if path.suffix == ".json":
        raise InputError(
            f"{path.name} is one value of JSON, not a text per line; write a row per line into a .jsonl file"
        )
    if path.is_file() and (path.suffix == ".txt" or not is_readable(path)):
        return read_lines_of(path)
    found = documents.texts_of(str(source), LAB_PROMPTS, replace(reading, chat=None))
    return [text for text in found if isinstance(text, str)]


def read_lines_of(path: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        InputError: no such file, not text, or no line.
    """
    from qwen_scope.files import text_lines

    try:
        lines = text_lines(path.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the prompts in {str(path)!r} can't be read: {type(error).__name__}") from None
    if not lines:
        raise InputError(f"{str(path)!r} holds no prompt")
    return lines


def parse_amounts(text: str) -> list[float]:
    """`0.2,0.5,1` as numbers; raises InputError for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--amounts are numbers with commas between, not {text!r}") from None

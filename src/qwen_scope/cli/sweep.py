"""`qwen-scope sweep`: dose and response of a feature or a recipe, and a proposed amount."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.errors import InputError

from . import options, output, steer

if TYPE_CHECKING:
    from qwen_scope.scope import Scope
    from qwen_scope.steer import Continuations, Sweep, Target

Prompts = Annotated[Path, typer.Argument(help="A text file with one prompt per line.")]
Regex = Annotated[str | None, typer.Option("--regex", help="Target: the share of texts it is found in.")]
Script = Annotated[str | None, typer.Option("--script", help="Target: share of letters in a script, such as CYRILLIC.")]
OtherFeature = Annotated[
    str | None, typer.Option("--target-feature", help="Target: another feature's mean activation, as LAYER:FEATURE.")
]


def sweep(
    prompts: Prompts,
    model: options.Model = "lab",
    sae: options.Sae = None,
    layer: steer.Layer = None,
    feature: steer.Feature = None,
    op: steer.Op = "add",
    unit: steer.Unit = "resid_norm",
    where: steer.Where = "all",
    recipe: steer.RecipeFile = None,
    regex: Regex = None,
    script: Script = None,
    continuation: Annotated[
        list[str] | None, typer.Option("--continuation", help="Target: log-probability of this; may be repeated.")
    ] = None,
    target_feature: OtherFeature = None,
    amounts: Annotated[str | None, typer.Option("--amounts", help="The grid, such as 0.2,0.5,1.")] = None,
    lower: Annotated[bool, typer.Option("--lower", help="Lower the target instead of raising it.")] = False,
    max_perplexity: Annotated[float, typer.Option("--max-perplexity", help="Budget: times the unsteered.")] = 2.0,
    max_repetition: Annotated[float, typer.Option("--max-repetition", help="Budget: added to the unsteered.")] = 0.1,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Propose a smaller amount whose effect is this close to the largest.")
    ] = 0.0,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="Texts, one per line, whose perplexity the budget counts from.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a figure (.png); needs matplotlib.")] = None,
    chat: options.Chat = None,
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
    from qwen_scope.steer import Budget, Decoding, Row
    from qwen_scope.steer import sweep as run_sweep

    mode = options.check_chat(chat)
    decoding = Decoding(max_new_tokens, sample, temperature, seed=seed)
    budget = Budget(max_perplexity, max_repetition, tolerance)
    grid = None if amounts is None else parse_amounts(amounts)
    amount = None if op == "ablate" else 1.0
    one = None if recipe is not None else steer.one_intervention(layer, feature, op, amount, unit, where)
    lines, texts = read_prompts(prompts), read_prompts(reference) if reference is not None else []
    with output.status("opening the model"):
        scope = options.open_scope(model, sae, device, dtype, k)
    target = chosen_target(scope, regex, script, continuation, target_feature)
    interventions = steer.from_recipe(scope, recipe) if recipe is not None else [one] if one is not None else []
    tokens = scope.tokenize(texts, truncate=True) if texts else None
    known = (
        [Row(tuple(ids[:n].tolist())) for ids, n in zip(tokens.input_ids, tokens.lengths, strict=True) if n > 1]
        if tokens
        else []
    )
    with bar() as report:
        found = run_sweep(
            scope.model,
            scope.tokenizer,
            lines,
            interventions,
            target,
            amounts=grid,
            lower=lower,
            saes=scope.saes,
            stats=scope.sizes,
            decoding=decoding,
            chat=mode,
            budget=budget,
            reference=known,
            report=report,
        )
    if plot is not None:
        from qwen_scope.steer import plot_sweep

        plot_sweep(found, plot)
    if as_json:
        output.print_json(found.to_json() | {"n_prompts": len(lines)})
    else:
        print_sweep(found)


@contextmanager
def bar() -> Iterator[Callable[[str, float, str], None] | None]:
    """A progress bar where somebody watches; elsewhere it would leave an empty line before an error."""
    if sys.stderr.isatty():
        with output.progress() as report:
            yield report
    else:
        yield None


def print_sweep(found: Sweep) -> None:
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
    output.show(f"Dose and response; the budget counts from a perplexity of {found.reference:.4g}", columns, rows)
    out = output.console()
    if found.best is None:
        out.print("No amount inside the budget does better than the unsteered model.")
    else:
        out.print(f"Proposed: {found.best.amount:g}, effect {found.best.effect}.")


def chosen_target(
    scope: Scope, regex: str | None, script: str | None, continuation: list[str] | None, feature: str | None
) -> Target | Continuations:
    """The one target that was named.

    Raises:
        InputError: none, or several.
    """
    from qwen_scope.steer import Continuations, matches
    from qwen_scope.steer import script as script_share

    named = [value for value in (regex, script, continuation, feature) if value]
    if len(named) != 1:
        raise InputError("name one target: --regex, --script, --continuation or --target-feature")
    if regex:
        return matches(regex)
    if script:
        return script_share(script)
    if continuation:
        return Continuations(tuple(continuation))
    return feature_target(scope, str(feature))


def feature_target(scope: Scope, text: str) -> Target:
    """The mean activation of a feature over each text, read from `LAYER:FEATURE`."""
    import re

    match = re.fullmatch(r"(\d{1,6}):(\d{1,9})", text)
    if not match:
        raise InputError(f"--target-feature is LAYER:FEATURE, such as 4:1028, not {text!r}")
    return scope.feature_target(int(match[1]), int(match[2]))


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        InputError: no such file, not text, or no line.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
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

"""What a command changes, aims at and generates, as groups of options."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from qwen_scope.features import (
    Budget,
    By,
    ChangeOptions,
    FindOptions,
    Rules,
    SweepOptions,
    TargetOptions,
    ValidateOptions,
)
from qwen_scope.scope import ScopeOptions
from qwen_scope.steer import Decoding

from . import options
from .groups import OPTIONS, Read


def read_rule(path: Path | None) -> Any:
    """A classifier's rule; raises NotFoundError and FormatError for none."""
    from qwen_scope.analysis import Rule

    return None if path is None else Rule.load(path)


def read_amounts(text: str) -> tuple[float, ...]:
    """`0.2,0.5,1` as numbers; raises InputError for anything else."""
    from qwen_scope.errors import InputError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--amounts are numbers with commas between, not {text!r}") from None


OPTIONS[ChangeOptions] = {
    "feature": Annotated[str | None, typer.Option("--feature", help="The feature, named LAYER/FEATURE.")],
    "op": Annotated[str, typer.Option("--op", help="add, scale, clamp, floor, cap or ablate.")],
    "amount": Annotated[float | None, typer.Option("--amount", help="How much, in --unit; not for ablate.")],
    "unit": Annotated[
        str, typer.Option("--unit", help="raw, resid_norm (lengths of the layer's residual) or max_act.")
    ],
    "where": Annotated[
        str,
        typer.Option(
            "--where", help="all, prompt, generated, positions (0,2,5-8), phases (thinking, prompt:user), or several."
        ),
    ],
    "recipe": Annotated[Path | None, typer.Option("--recipe", help="Apply a saved recipe (.json or .yaml) instead.")],
}
OPTIONS[TargetOptions] = {
    "regex": Annotated[str | None, typer.Option("--regex", help="Target: the share of texts it is found in.")],
    "script": Annotated[
        str | None, typer.Option("--script", help="Target: share of letters in a script, such as CYRILLIC.")
    ],
    "continuation": Annotated[
        list[str] | None,
        typer.Option("--continuation", help="Target: log-probability of this; may be repeated."),
        Read(lambda given: tuple(map(options.typed, given or ()))),
    ],
    "target_feature": Annotated[
        str | None,
        typer.Option("--target-feature", help="Target: another feature's mean activation, as LAYER/FEATURE."),
    ],
    "rule": Annotated[
        Path | None,
        typer.Option("--rule", help="Target: the share of texts that a classifier's rule (JSON) calls positive."),
        Read(read_rule),
    ],
}
BUDGET: dict[str, Any] = {
    "perplexity_ratio": Annotated[float, typer.Option("--max-perplexity", help="Budget: times the unsteered.")],
    "repetition": Annotated[float, typer.Option("--max-repetition", help="Budget: added to the unsteered.")],
}
OPTIONS[Budget] = {
    **BUDGET,
    "tolerance": Annotated[
        float, typer.Option("--tolerance", help="Propose a smaller amount whose effect is this close to the largest.")
    ],
}
OPTIONS[SweepOptions] = {
    "amounts": Annotated[
        str | None, typer.Option("--amounts", help="The grid: 0.2,0.5,1. Default: 0.1 to 1.6."), Read(read_amounts)
    ],
    "lower": Annotated[bool, typer.Option("--lower", help="Lower the target instead of raising it.")],
    "budget": Budget,
}
OPTIONS[Rules] = BUDGET
OPTIONS[ValidateOptions] = {
    "lower": Annotated[bool, typer.Option("--lower", help="The feature is said to lower the target.")],
    "n_random": Annotated[int, typer.Option("--random", help="How many matched random features.")],
    "n_shuffled": Annotated[int, typer.Option("--shuffled", help="How many shuffles of the examples' labels.")],
    "rules": Rules,
    "seed": Annotated[int, typer.Option("--seed", help="Of the draws.", **options.SEED)],
}
OPTIONS[Decoding] = {
    "max_new_tokens": Annotated[int, typer.Option("--max-new-tokens", help="The most tokens to generate.")],
    "sample": Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the most probable.")],
    "temperature": Annotated[
        float | None, typer.Option("--temperature", help="With --sample. Default: the model's own.")
    ],
    "top_p": Annotated[float | None, typer.Option("--top-p", help="With --sample. Default: the model's own.")],
    "top_k": Annotated[int | None, typer.Option("--top-k", help="With --sample. Default: the model's own.")],
    "repetition_penalty": Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1 discourages repetition.")
    ],
    "seed": Annotated[int, typer.Option("--seed", help="Of the draws.", **options.SEED)],
}
OPTIONS[FindOptions] = {
    "by": Annotated[
        str,
        typer.Option("--by", help="Rank by f1, difference, rate or auroc."),
        Read(partial(options.one_of, "--by", known=get_args(By)), "f1"),
    ],
    "level": Annotated[float, typer.Option("--level", help="False discovery rate.")],
    "n": Annotated[int, typer.Option("-n", help="How many features.", min=1)],
    "seed": Annotated[
        int, typer.Option("--seed", help="Of the halves that choose and measure, and of intervals.", **options.SEED)
    ],
    "phases": Annotated[options.Phase, Read(options.phases_tuple)],
    "against": Annotated[
        str | None,
        typer.Option("--against", help="Compare --phase with these phases of the same documents."),
        Read(options.phases_tuple),
    ],
}

# The defaults where the command line says nothing.
SCOPE, DECODING, FORTY = ScopeOptions(), Decoding(), Decoding(max_new_tokens=40)
CHANGE, ADDED, TARGET = ChangeOptions(), ChangeOptions(amount=1.0), TargetOptions()
SWEEP, VALIDATE, FIND = SweepOptions(), ValidateOptions(), FindOptions()

"""Sweep several candidate interventions alike and take the one with the largest effect inside the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwen_scope.errors import InputError

from .intervention import Intervention
from .sweep import Continuations, Sweep, sweep
from .targets import Target


def sweep_candidates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    candidates: Mapping[str, Sequence[Intervention]],
    target: Target | Continuations,
    *,
    report: Callable[[str, float, str], None] | None = None,
    **options: Any,
) -> dict[str, Sweep]:
    """A sweep of every candidate, such as features of different layers, on the same prompts.

    Args:
        candidates: names to interventions.
        options: as in `sweep`.

    Raises:
        InputError: no candidate, or what `sweep` refuses.
    """
    if not candidates:
        raise InputError("there is no candidate to sweep")
    found = {}
    for name, interventions in candidates.items():

        def told(stage: str, share: float, text: str, name: str = name) -> None:
            if report is not None:
                report(stage if len(candidates) == 1 else name, share, text)

        found[name] = sweep(model, tokenizer, prompts, interventions, target, report=told, **options)
    return found


def best_candidate(sweeps: Mapping[str, Sweep]) -> str | None:
    """The candidate whose proposal does most, or None where none proposes anything.

    Of those within the budget's tolerance of the largest effect, the one that moves the unsteered distribution least.
    """
    sign = {name: -1.0 if one.lower else 1.0 for name, one in sweeps.items()}
    doses = {name: one.best for name, one in sweeps.items() if one.best is not None}
    if not doses:
        return None
    effects = {name: sign[name] * dose.effect.estimate for name, dose in doses.items()}
    largest = max(effects.values())
    close = [name for name, effect in effects.items() if effect >= largest - sweeps[name].budget.tolerance]
    return min(close, key=lambda name: (doses[name].kl, -effects[name]))

"""Sweep several candidate interventions alike and take the one with the largest effect inside the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen_scope.errors import InputError
from qwen_scope.report import Progress
from qwen_scope.scope import Scope
from qwen_scope.steer import Decoding, Intervention, Row, Target
from qwen_scope.text import Chat

from .options import SweepOptions
from .sweep import Continuations, Sweep, sweep


def sweep_candidates(
    scope: Scope,
    prompts: Sequence[str],
    candidates: Mapping[str, Sequence[Intervention]],
    target: Target | Continuations,
    options: SweepOptions | None = None,
    *,
    decoding: Decoding | None = None,
    chat: Chat | None = None,
    reference: Sequence[Row] = (),
    progress: Progress | None = None,
) -> dict[str, Sweep]:
    """A sweep of every candidate, such as features of different layers, on the same prompts.

    Args:
        candidates: names to interventions; the other arguments are those of `sweep`.
        progress: as in `sweep`; of several candidates each is a stage.

    Raises:
        InputError: no candidate, or what `sweep` refuses.
    """
    if not candidates:
        raise InputError("there is no candidate to sweep")
    found = {}
    for name, interventions in candidates.items():

        def tell(stage: str, share: float, text: str, name: str = name) -> None:
            if progress is not None:
                progress(stage if len(candidates) == 1 else name, share, text)

        found[name] = sweep(
            scope,
            prompts,
            interventions,
            target,
            options,
            decoding=decoding,
            chat=chat,
            reference=reference,
            progress=tell,
        )
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

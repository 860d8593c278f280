"""`qwen-scope validate`: whether a feature is causal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.errors import InputError
from qwen_scope.features import ChangeOptions, TargetOptions, ValidateOptions
from qwen_scope.scope import ScopeOptions
from qwen_scope.steer import Decoding
from qwen_scope.text import CorpusOptions

from . import changes, names, options, output, sweep
from .groups import LINES, OPTIONS, grouped

if TYPE_CHECKING:
    from qwen_scope.features import Notes, Selectivity, Verdict
    from qwen_scope.scope import Scope
    from qwen_scope.steer import Intervention


@dataclass(frozen=True)
class Extra:
    """What is done beside the test.

    Attributes:
        tasks: questions that must not suffer.   removal: compare ways of removing the feature.
        record: a store that keeps the verdict.
    """

    tasks: Path | None = None
    removal: bool = False
    record: Path | None = None


OPTIONS[Extra] = {
    "tasks": Annotated[
        Path | None, typer.Option("--tasks", help='JSON lines {"prompt": ..., "answer": ...} that must not suffer.')
    ],
    "removal": Annotated[
        bool, typer.Option("--selectivity", help="Also compare removing the feature with removing a direction.")
    ],
    "record": Annotated[
        Path | None, typer.Option("--record", help="Keep the verdict in this store, where the feature's card reads it.")
    ],
}
NOTHING = Extra()


@partial(grouped, without=["reading.unit", "reading.sample", "reading.seed", "op", "continuation"])
def validate(
    prompts: sweep.Prompts,
    positive: Annotated[str, typer.Option("--positive", help="Texts with the property, read like prompts.")],
    negative: Annotated[str, typer.Option("--negative", help="Texts without it.")],
    unrelated: Annotated[str, typer.Option("--unrelated", help="Texts that have nothing to do with it.")],
    asked: ScopeOptions = changes.SCOPE,
    change: ChangeOptions = changes.ADDED,
    aim: TargetOptions = changes.TARGET,
    controls: ValidateOptions = changes.VALIDATE,
    reference: sweep.Reference = None,
    extra: Extra = NOTHING,
    chat: options.Chat = None,
    reading: CorpusOptions = LINES,
    decoding: Decoding = changes.FORTY,
    as_json: options.Json = False,
) -> None:
    """Test whether a feature is causal: causal; causal, but breaks fluency; correlated only; entangled; no effect.

    The same prompts run under the feature, matched random features, the opposite sign, a difference of means, shuffled
    labels and prompting alone; the rules are printed with what was found. Fluency has the budget that sweep keeps.
    """
    from qwen_scope.features import (
        Examples,
        answer_task,
        check_change,
        interventions_of,
        read_task,
        scored_rows,
        selectivity,
        text_target,
    )
    from qwen_scope.features import validate as run_validate

    mode = options.check_chat(chat)
    check_change(change)
    lines = [tuple(sweep.read_prompts(path, reading)) for path in (prompts, positive, negative, unrelated)]
    questions = None if extra.tasks is None else read_task(extra.tasks)
    texts = sweep.read_prompts(reference, reading) if reference is not None else []
    scope = options.open_asked(asked)
    kept = None if extra.record is None else kept_in(extra.record, scope, change)
    target = text_target(scope, aim)
    interventions = interventions_of(scope, change)
    examples = Examples(*lines[1:])
    removed = selectivity(scope, interventions, examples, seed=controls.seed) if extra.removal else None
    with output.progress() as progress:
        verdict = run_validate(
            scope,
            interventions,
            target,
            lines[0],
            examples,
            controls,
            reference=scored_rows(scope, texts),
            decoding=decoding,
            tasks={} if questions is None else {"the task": answer_task(scope, questions, chat=mode)},
            chat=mode,
            progress=progress,
        )
    if kept is not None:
        notes, place = kept
        notes.verdict(*place, verdict.to_json())
    print_found(verdict, removed, interventions, as_json)


def kept_in(folder: Path, scope: Scope, change: ChangeOptions) -> tuple[Notes, tuple[int, int]]:
    """The record of a store that fits the SAE, and the feature that the verdict is about; asked before the work."""
    from qwen_scope.features import Notes
    from qwen_scope.sae import parse_feature
    from qwen_scope.store import FeatureStore

    if change.feature is None:
        raise InputError("--record keeps the verdict on one feature; name it with --feature instead of --recipe")
    place = parse_feature(change.feature)
    store = FeatureStore(folder)
    store.check_feature(*place)
    store.require(place[0], scope.saes[place[0]])
    return Notes(store), place


def print_found(
    verdict: Verdict, removed: Selectivity | None, interventions: Sequence[Intervention], as_json: bool
) -> None:
    """The verdict, and beside it the comparison of removals where it was asked for."""
    if as_json:
        called = names.of_changes(interventions)
        more = ({"selectivity": removed.to_json()} if removed else {}) | ({"names": called} if called else {})
        output.print_json(verdict.to_json() | more)
        return
    output.show_changes(interventions)
    print_verdict(verdict)
    if removed is not None:
        print_selectivity(removed)


def print_selectivity(found: Selectivity) -> None:
    """Both ways of removal side by side."""
    names = {
        "share": "taken away, share",
        "effect": f"effect: {found.measured_by}",
        "full": "effect with all taken away",
        "kl": "KL on unrelated text",
        "loss": "loss on unrelated text",
        "near_kl": "KL on negative examples",
        "near_loss": "loss on negative examples",
        "moved": "activation of other features moved there",
    }
    rows = [
        (name, *(str(v) if not isinstance(v, float) else v for v in (getattr(way, key) for way in ways)))
        for ways in [(found.features, found.direction)]
        for key, name in names.items()
    ]
    output.show("Removal at equal effect", ("", found.features.name, found.direction.name), rows)
    out = output.console()
    if not found.comparable:
        out.print("One of the two has no effect that can be told from zero, so their costs can't be compared.")
    else:
        out.print(f"The direction costs {found.extra_kl} more KL than the features, and {found.extra_loss} more loss.")


def print_verdict(verdict: Verdict) -> None:
    """The word, the rules with what was found, the conditions, and what else moved."""
    from rich.text import Text

    out = output.console()
    out.print(Text(f"Verdict: {verdict.outcome}", style="bold"))
    for reason in verdict.reasons:
        out.print(Text(f"  {reason}"))
    out.print()
    rows = [
        (
            condition.name,
            condition.effect.estimate,
            f"{condition.effect.low:.3g} to {condition.effect.high:.3g}",
            "no text" if condition.perplexity is None else condition.perplexity,
            condition.repetition,
        )
        for condition in verdict.conditions
    ]
    columns = ("generated under", "target", "95% interval", "perplexity", "repetition")
    output.show("The target under each, with the perplexity under the unsteered model", columns, rows)
    each = ", ".join(f"{condition.effect.estimate:.3g}" for condition in verdict.shuffled)
    out.print(f"Shuffled labels are {len(verdict.shuffled)} shuffles as one control: {each}")
    side = verdict.side
    out.print(
        f"On unrelated text: KL {side.kl}, under the difference of means {side.kl_of_direction}, loss {side.loss}"
    )
    moved = [(m.layer, m.feature, m.before, m.after) for m in side.moved]
    output.show("Other features that the change itself moves there", ("layer", "feature", "before", "after"), moved)

"""`sweep`: dose and response of interventions, and the strongest amount that a fluency budget allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from qwen_scope.errors import InputError
from qwen_scope.report import HasFrames, Progress, Table, flat
from qwen_scope.scope import Scope, Texts, as_texts
from qwen_scope.stats import Interval, bootstrap
from qwen_scope.steer import (
    Decoding,
    Generation,
    Intervention,
    Recipe,
    Row,
    Target,
    log_probabilities,
    next_token_kl,
    perplexity,
    phases_for,
    repetition,
    resolve,
    rows_of,
    target_values,
)
from qwen_scope.text import Chat, Tokens, tokenize

from .options import Budget, SweepOptions

GRID = (0.1, 0.2, 0.4, 0.6, 0.8, 1.2, 1.6)
"""Lengths of the change, in units of the layer's median residual norm."""

SHARES = {"scale": (0.5, 2.0, 4.0, 8.0), "ablate": (0.25, 0.5, 0.75, 1.0)}
"""Doses of the operations whose amount is a share."""


@dataclass(frozen=True)
class Continuations:
    """The target "how likely are these continuations": mean log-probability per token, under the interventions."""

    texts: tuple[str, ...]


@dataclass(frozen=True)
class Dose:
    """What one amount did, on all prompts.

    Attributes:
        amount: what the interventions' own amounts were multiplied by; 0 is the unsteered run.
        effect: the target's mean with its bootstrap interval.
        perplexity: of the continuations under the unsteered model.
        repetition: mean share of repeated 3-grams.
        kl: mean KL(unsteered || steered) per token in nats, along the unsteered continuations.
        fits: whether it keeps the budget.
        example: one continuation.
    """

    amount: float
    effect: Interval
    perplexity: float
    repetition: float
    kl: float
    fits: bool
    example: str


@dataclass(frozen=True, repr=False)
class Sweep(HasFrames):
    """Dose and response.

    Attributes:
        doses: by amount, the unsteered run first.
        proposed: among the amounts that keep the budget, the smallest whose effect comes within the budget's
            `tolerance` of the largest; None if none of them beats the unsteered run.
        reference: the perplexity that the budget is counted from.
        interventions: what was dosed, as plain data.
    """

    doses: tuple[Dose, ...]
    proposed: float | None
    reference: float
    budget: Budget
    lower: bool
    interventions: tuple[dict[str, Any], ...]

    @property
    def best(self) -> Dose | None:
        """The proposed dose."""
        return next((dose for dose in self.doses if dose.amount == self.proposed), None)

    def sheet(self) -> Table:
        """A row per dose, the proposed one marked."""
        proposed = "none beats the unsteered run" if self.proposed is None else f"proposed: {self.proposed:g}"
        rows = [{**flat(dose), "proposed": dose.amount == self.proposed} for dose in self.doses]
        return Table.of(f"Dose and response; {proposed}", rows)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def sweep(
    scope: Scope,
    prompts: Texts,
    interventions: Intervention | Sequence[Intervention],
    target: Target | Continuations,
    options: SweepOptions | None = None,
    *,
    decoding: Decoding | None = None,
    chat: Chat | None = None,
    reference: Sequence[Row] = (),
    progress: Progress | None = None,
) -> Sweep:
    """Generate under a grid of amounts, measure what it does and what it costs, and propose one.

    Args:
        interventions: each runs at its own amount times the dose, so their proportions stay.
        target: a callable from the continuations to one number each, or `Continuations`; see `target_of`.
        options: the grid, the aim and the budget.
        decoding: by default 40 tokens, greedy.
        chat: render each prompt with the chat template.
        reference: tokens whose perplexity the budget counts from, such as unsteered continuations that are in the
            language wanted (`rows_of`) or texts (`scored_rows`); by default the unsteered continuations of `prompts`.
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        InputError: fewer than two prompts, no intervention, or what `generate` refuses.
    """
    options, prompts = options or SweepOptions(), as_texts(prompts)
    interventions = [interventions] if isinstance(interventions, Intervention) else interventions
    if len(prompts) < 2 or not interventions:
        raise InputError(f"a sweep needs two prompts and an intervention, not {len(prompts)} and {len(interventions)}")
    run = _Run(scope, prompts, interventions, target, options, decoding, chat, reference)
    grid = sorted(set(options.amounts if options.amounts is not None else run.grid()) - {0.0}, key=abs)
    tell = progress or (lambda stage, share, text: None)
    refine = options.refine
    doses = [run.dose(0.0)]
    for i, amount in enumerate(grid):
        doses.append(run.dose(amount))
        tell("sweep", (i + 1) / (len(grid) + refine), f"amount {amount:g}: effect {doses[-1].effect.estimate:.3g}")
    for i in range(refine):
        between = _between(doses, run.propose(doses))
        if between is not None:
            doses.append(run.dose(between))
        tell("sweep", (len(grid) + i + 1) / (len(grid) + refine), "refining")
    ordered = sorted(doses[1:], key=lambda dose: dose.amount)
    return Sweep(
        (doses[0], *ordered),
        run.propose(doses),
        run.reference,
        options.budget,
        options.lower,
        tuple(one.to_json() for one in interventions),
    )


def proposal(scope: Scope, name: str, found: Sweep, *, provenance: str = "a sweep") -> Recipe:
    """The interventions of a sweep at the proposed amount as a recipe, with what was measured.

    Raises:
        InputError: the sweep proposes nothing.
    """
    if found.best is None:
        raise InputError("no amount inside the budget does better than the unsteered model, so there is no recipe")
    dosed = [Intervention.from_json(one) for one in found.interventions]
    effect = {
        "target": found.best.effect.estimate,
        "target_unsteered": found.doses[0].effect.estimate,
        "perplexity": found.best.perplexity,
        "perplexity_reference": found.reference,
        "kl": found.best.kl,
        "prompts": found.best.effect.n,
    }
    chosen = [one.with_amount(one.amount * found.best.amount) for one in dosed]
    return Recipe.of(name, scope.model, chosen, scope.saes, provenance=provenance, effect=effect, counted=scope.counted)


class _Run:
    """One sweep at work: what stays the same from dose to dose."""

    def __init__(
        self,
        scope: Scope,
        prompts: Sequence[str],
        interventions: Sequence[Intervention],
        target: Target | Continuations,
        options: SweepOptions,
        decoding: Decoding | None,
        chat: Chat | None,
        reference: Sequence[Row],
    ) -> None:
        self.scope, self.model, self.saes, self.stats = scope, scope.model, scope.saes, scope.stats
        self.prompts, self.interventions, self.target = list(prompts), list(interventions), target
        self.lower, self.budget = options.lower, options.budget
        self.chat: Chat | None = chat
        self.decoding = decoding or Decoding(max_new_tokens=40)
        tokens = tokenize(scope.tokenizer, self.prompts, max_length=None, chat=chat)
        self.prompt_ids = _ids(tokens)
        self.phases = phases_for(interventions, scope.tokenizer, tokens, chat)
        self.plain = self.generated([])
        self.plain_rows = [row for row in rows_of(self.prompt_ids, self.plain, self.phases) if row.start < len(row.ids)]
        self.reference = perplexity(log_probabilities(self.model, list(reference) or self.plain_rows))
        self.plain_repetition = self.repeated(self.plain)

    def generated(self, interventions: Sequence[Intervention]) -> list[Generation]:
        return self.scope.generate(self.prompts, interventions, decoding=self.decoding, chat=self.chat)

    def repeated(self, generations: Sequence[Generation]) -> float:
        return float(np.mean([repetition([t.token_id for t in one.tokens]) for one in generations]))

    def at(self, amount: float) -> list[Intervention]:
        return [] if amount == 0 else [one.with_amount(one.amount * amount) for one in self.interventions]

    def dose(self, amount: float) -> Dose:
        chosen = self.at(amount)
        made = self.generated(chosen) if chosen else self.plain
        if isinstance(self.target, Continuations):
            values = self.likelihood(chosen, self.target)
        else:
            values = target_values(self.target, [one.text for one in made])
        cost = perplexity(log_probabilities(self.model, rows_of(self.prompt_ids, made)))
        repeated = self.repeated(made)
        kl = 0.0
        if chosen and self.plain_rows:
            found = next_token_kl(self.model, self.plain_rows, chosen, self.saes, self.stats)
            kl = float(np.concatenate(found).mean())
        fluent = cost <= self.budget.perplexity_ratio * self.reference
        fits = fluent and repeated <= self.plain_repetition + self.budget.repetition
        return Dose(amount, bootstrap(values), cost, repeated, kl, fits, made[0].text)

    def likelihood(self, chosen: Sequence[Intervention], target: Continuations) -> np.ndarray:
        """Mean log-probability per token of the continuations, one number per prompt."""
        after = _ids(tokenize(self.scope.tokenizer, list(target.texts), max_length=None))
        rows = [
            Row((*ids, *more), len(ids), None if self.phases is None else self.phases.followed(i, more))
            for i, ids in enumerate(self.prompt_ids)
            for more in after
        ]
        found = log_probabilities(self.model, rows, chosen, self.saes, self.stats)
        return np.array([float(values.mean()) for values in found]).reshape(len(self.prompt_ids), -1).mean(1)

    def propose(self, doses: Sequence[Dose]) -> float | None:
        sign = -1.0 if self.lower else 1.0
        plain = doses[0]
        good = [d for d in doses[1:] if d.fits and sign * d.effect.estimate > sign * plain.effect.estimate]
        if not good:
            return None
        enough = max(sign * d.effect.estimate for d in good) - self.budget.tolerance
        return min((d for d in good if sign * d.effect.estimate >= enough), key=lambda d: abs(d.amount)).amount

    def grid(self) -> list[float]:
        """Doses that make the longest change `GRID` residuals long; for shares, `SHARES`."""
        shares = [one for one in self.interventions if one.op in SHARES]
        if shares:
            fixed = all(one.op == "ablate" and one.feature is not None for one in shares)
            return [1.0] if fixed else list(SHARES[shares[0].op])
        if all(one.unit == "resid_norm" for one in self.interventions):
            longest = max(abs(one.amount) for one in self.interventions)
        else:
            longest = 0.0
            for one in resolve(self.model, self.interventions, self.saes, self.stats):
                sae = self.saes[one.layer] if one.feature is not None else None
                length = abs(one.amount) * float(torch.linalg.vector_norm(one.vector(sae)))
                longest = max(longest, length / self.stats[one.layer].norm_median)
        if longest == 0:
            raise InputError("every amount is 0, so there is nothing to dose; give each intervention its proportion")
        return [length / longest for length in GRID]


def _between(doses: Sequence[Dose], proposed: float | None) -> float | None:
    """An amount halfway between the best one and the next larger one, which broke the budget."""
    start = next((dose for dose in doses if dose.amount == proposed), None)
    if start is None:
        return None
    side = [d for d in doses if d.amount * start.amount > 0 and abs(d.amount) > abs(start.amount)]
    beyond = min(side, key=lambda d: abs(d.amount), default=None)
    if beyond is None or beyond.fits:
        return None
    return math.copysign(math.sqrt(start.amount * beyond.amount), start.amount)


def _ids(tokens: Tokens) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(tokens.input_ids, tokens.lengths, strict=True)]

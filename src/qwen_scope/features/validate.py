"""`validate`: is a feature causal, or only correlated?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.model import LayerStats, capture
from qwen_scope.report import HasFrames, Progress, Table
from qwen_scope.scope import Scope, Texts, as_texts
from qwen_scope.stats import Interval, bootstrap, difference
from qwen_scope.steer import (
    Decoding,
    Intervention,
    Row,
    SAEsByLayer,
    Target,
    calibrate,
    generate,
    log_probabilities,
    next_token_kl,
    perplexity,
    repetition,
    resolve,
    rows_of,
    target_values,
)
from qwen_scope.text import Chat

from .conditions import along, halved, matched_random, mean_direction, of_concept
from .fluency import perplexity_ratio
from .options import Rules, ValidateOptions
from .verdict import Evidence, judge

Task = Callable[[list[Intervention]], np.ndarray]
"""A task's score per item (1 right, 0 wrong) under interventions; called with none for the unsteered model."""


@dataclass(frozen=True)
class Examples:
    """Texts with and without the property, and texts that have nothing to do with it."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    unrelated: tuple[str, ...]


@dataclass(frozen=True)
class Condition:
    """One way of generating: the target's mean, the perplexity of its text under the unsteered model (None where no
    token came out), its mean share of repeated 3-grams, and one continuation."""

    name: str
    effect: Interval
    perplexity: float | None
    repetition: float
    example: str


@dataclass(frozen=True)
class Moved:
    """A feature that the change itself moves on unrelated text: its mean activation before and after."""

    layer: int
    feature: int
    before: float
    after: float


@dataclass(frozen=True)
class SideEffects:
    """What happens to unrelated text, per token: KL(unsteered || steered), the same under the difference-of-means
    direction, the rise of the loss (all in nats), and the features moved most."""

    kl: Interval
    kl_of_direction: Interval
    loss: Interval
    moved: tuple[Moved, ...]


@dataclass(frozen=True, repr=False)
class Verdict(HasFrames):
    """The outcome, the rules with what was found, and every figure.

    `conditions` holds the shuffles of the labels as one condition, whose effect is the mean over them with an interval
    over them; `shuffled` holds each alone.
    """

    outcome: str
    reasons: tuple[str, ...]
    conditions: tuple[Condition, ...]
    shuffled: tuple[Condition, ...]
    side: SideEffects
    evidence: Evidence
    rules: Rules
    interventions: tuple[dict[str, Any], ...]

    def sheet(self) -> Table:
        """A row per condition: the target under it, and what it costs in fluency."""
        return Table.of(f"Verdict: {self.outcome}", self.conditions)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def validate(
    scope: Scope,
    interventions: Intervention | Sequence[Intervention],
    target: Target,
    prompts: Texts,
    examples: Examples,
    options: ValidateOptions | None = None,
    *,
    reference: Sequence[Row] = (),
    decoding: Decoding | None = None,
    prompting: Callable[[str], str] | None = None,
    tasks: Mapping[str, Task] | None = None,
    chat: Chat | None = None,
    saes: SAEsByLayer | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Compare an intervention with its controls and classify it.

    The same prompts and draws run under the interventions, matched random features, the opposite sign, the
    difference-of-means direction of the examples, those of shuffles of their labels (all with the same length of
    change), and under prompting alone. The shuffles are one control: the feature is compared with their mean,
    whose interval is over shuffles, since a single one may by chance point where the real labels do. The text has to
    keep the fluency budget of the rules, which is that of `sweep`. A feature that fires over twice as often on the
    positive examples as on the negative ones is of the concept itself, so it is never drawn as a random one.

    Args:
        interventions: features added, with the amount that `sweep` found.
        target: from continuations to one number each; what the interventions are expected to raise.
        options: the controls and the rules.
        reference: tokens whose perplexity the budget counts from, as in `sweep`; by default the unsteered text.
        prompting: from a prompt to one that asks for the property; by default two positive examples before it.
        tasks: scores that must not suffer, such as `answer_task`.
        chat: render each prompt with the chat template.
        saes: other SAEs than the scope's.
        progress: called with the stage, its share done (0 to 1) and a short text.

    Raises:
        InputError: fewer prompts, examples, random features or shuffles than the rules ask for, interventions that add
            no feature, or text without a token.
    """
    options, prompts = options or ValidateOptions(), as_texts(prompts)
    interventions = [interventions] if isinstance(interventions, Intervention) else interventions
    n_random, n_shuffled, rules, seed = options.n_random, options.n_shuffled, options.rules, options.seed
    _check(interventions, prompts, examples, options)
    run = _Run(scope, interventions, target, list(prompts), examples, options.lower, decoding, chat, saes, seed)
    tell = progress or (lambda stage, share, text: None)
    total = n_random + n_shuffled + 5
    plain, under = run.condition("unsteered", []), run.condition("this feature", run.interventions)
    fluency = run.fluency(under, plain, reference)
    opposite = run.condition("the opposite sign", [one.with_amount(-one.amount) for one in run.interventions])
    direction = run.condition("difference of means", run.direction())
    asked = run.prompted(prompting or run.with_examples)
    tell("validate", 5 / total, "baselines")
    shuffled: list[_Made] = []
    for i in range(n_shuffled):
        shuffled.append(run.condition(f"shuffled labels {i + 1}", run.direction(shuffle=i)))
        tell("validate", (6 + i) / total, "shuffled labels")
    randoms, own = [], run.of_concept()
    for i in range(n_random):
        other = matched_random(run.interventions, run.saes, run.stats, np.random.default_rng([seed, i]), own)
        randoms.append(run.condition(f"random feature {i + 1}", other))
        tell("validate", (6 + n_shuffled + i) / total, "random features")
    side, excess = run.side_effects(rules)
    evidence = Evidence(
        **_compared(under, plain, opposite, shuffled, randoms, seed),
        detection=run.detection(),
        side=excess,
        fluency=fluency,
        tasks={name: bootstrap(task([]) - task(run.interventions), seed=seed) for name, task in (tasks or {}).items()},
    )
    outcome, reasons = judge(evidence, rules)
    first = [one.condition for one in (plain, under, opposite, direction)]
    conditions = (*first, run.pooled("shuffled labels", shuffled), asked.condition, *(one.condition for one in randoms))
    done = tuple(one.to_json() for one in interventions)
    return Verdict(outcome, reasons, conditions, tuple(one.condition for one in shuffled), side, evidence, rules, done)


@dataclass(frozen=True, eq=False)
class _Made:
    """What one condition generated: the target per prompt, counted towards the aim, log-probabilities of its tokens
    under the unsteered model, and the share of repeated 3-grams."""

    condition: Condition
    values: np.ndarray
    scored: list[np.ndarray]
    repeated: np.ndarray


class _Run:
    """One validation at work. Targets are counted towards the aim: lowering turns their sign."""

    def __init__(
        self,
        scope: Scope,
        interventions: Sequence[Intervention],
        target: Target,
        prompts: list[str],
        examples: Examples,
        lower: bool,
        decoding: Decoding | None,
        chat: Chat | None,
        saes: SAEsByLayer | None,
        seed: int,
    ) -> None:
        self.scope, self.target, self.prompts, self.examples = scope, target, prompts, examples
        self.chat: Chat | None = chat
        self.saes: SAEsByLayer = saes or scope.saes
        self.sign, self.seed = (-1.0 if lower else 1.0), seed
        self.decoding = decoding or Decoding(max_new_tokens=40)
        self.interventions = resolve(scope.model, interventions, self.saes, scope.stats)
        both = [*examples.positive, *examples.negative]
        self.stats: dict[int, LayerStats] = {
            layer: calibrate(scope.model, scope.tokenizer, layer, self.saes[layer], both, sample="the examples")
            for layer in {one.layer for one in interventions}
        }

    def condition(self, name: str, interventions: Sequence[Intervention]) -> _Made:
        return self._condition(name, self.prompts, interventions)

    def _condition(self, name: str, prompts: list[str], interventions: Sequence[Intervention]) -> _Made:
        scope = self.scope
        tools = {"saes": self.saes, "decoding": self.decoding, "chat": self.chat}
        made = generate(scope.model, scope.tokenizer, prompts, interventions, **tools)
        values = target_values(self.target, [one.text for one in made])
        tokens = scope.tokenize(prompts, chat=self.chat)
        ids = [row[:n].tolist() for row, n in zip(tokens.input_ids, tokens.lengths, strict=True)]
        scored = log_probabilities(scope.model, rows_of(ids, made))
        repeated = np.array([repetition([token.token_id for token in one.tokens]) for one in made])
        condition = Condition(
            name, bootstrap(values, seed=self.seed), _cost(scored), float(repeated.mean()), made[0].text
        )
        return _Made(condition, self.sign * values, scored, repeated)

    def pooled(self, name: str, made: list[_Made]) -> Condition:
        """Several conditions as one: the mean of their means with an interval over them; perplexity over all tokens."""
        effect = bootstrap([one.condition.effect.estimate for one in made], seed=self.seed)
        scored = [row for one in made for row in one.scored]
        repeated = float(np.mean([one.condition.repetition for one in made]))
        return Condition(name, effect, _cost(scored), repeated, made[0].condition.example)

    def fluency(self, under: _Made, plain: _Made, reference: Sequence[Row]) -> Interval:
        """How many times the reference's perplexity the steered text has."""
        if not reference:
            return perplexity_ratio(under.scored, plain.scored, paired=True, seed=self.seed)
        scored = log_probabilities(self.scope.model, list(reference))
        return perplexity_ratio(under.scored, scored, paired=False, seed=self.seed)

    def with_examples(self, prompt: str) -> str:
        return "\n".join([*self.examples.positive[:2], prompt])

    def prompted(self, prompting: Callable[[str], str]) -> _Made:
        return self._condition("prompting alone", [prompting(prompt) for prompt in self.prompts], [])

    def direction(self, shuffle: int | None = None) -> list[Intervention]:
        """The difference of means of the examples, or that of a shuffle of their labels."""
        positive, negative = list(self.examples.positive), list(self.examples.negative)
        if shuffle is not None:
            positive, negative = halved(positive, negative, np.random.default_rng([self.seed, shuffle]))
        layers = {one.layer for one in self.interventions}
        found = {layer: self.sign * mean_direction(self.scope, layer, positive, negative) for layer in layers}
        return along(self.interventions, self.saes, found)

    def of_concept(self) -> dict[int, set[int]]:
        """By layer, the features that fire much more often on positive tokens than on negative ones."""
        out = {}
        for layer in {one.layer for one in self.interventions}:
            rates = []
            for texts in (self.examples.positive, self.examples.negative):
                stats = calibrate(self.scope.model, self.scope.tokenizer, layer, self.saes[layer], texts)
                assert stats.firing_rate is not None, "an SAE was given"
                rates.append(np.asarray(stats.firing_rate))
            out[layer] = set(of_concept(*rates).nonzero()[0].tolist())
        return out

    def detection(self) -> Interval:
        """Share of an example's tokens on which a steering feature fires, positive minus negative."""
        rates = [self._rates(texts) for texts in (self.examples.positive, self.examples.negative)]
        return difference(rates[0], rates[1], seed=self.seed)

    def _rates(self, texts: Sequence[str]) -> np.ndarray:
        tokens = self.scope.tokenize(list(texts), truncate=True)
        mask = tokens.attention_mask.bool()
        fired = torch.zeros_like(mask)
        for layer in {one.layer for one in self.interventions}:
            h = self._residual(tokens.input_ids, tokens.attention_mask, layer)
            acts = self.saes[layer].encode(h.reshape(-1, h.shape[-1]))
            chosen = sorted(
                {one.feature for one in self.interventions if one.layer == layer and one.feature is not None}
            )
            fired |= (acts.select(chosen) > 0).any(-1).reshape(h.shape[:2]).cpu()
        return ((fired & mask).sum(-1) / mask.sum(-1)).double().numpy()

    def _residual(self, ids: Tensor, mask: Tensor, layer: int) -> Tensor:
        point = self.scope.hook_point(layer)
        return capture(self.scope.model, ids, [point], mask)[point]

    def side_effects(self, rules: Rules) -> tuple[SideEffects, Interval]:
        """KL, loss and moved features on unrelated text; its first half counts as prompt, the second is scored."""
        scope = self.scope
        tokens = scope.tokenize(list(self.examples.unrelated), truncate=True)
        pairs = zip(tokens.input_ids, tokens.lengths, strict=True)
        rows = [Row(tuple(ids[:n].tolist()), max(1, n // 2)) for ids, n in pairs if n > 1]
        kl, other = (
            np.array([float(v.mean()) for v in next_token_kl(scope.model, rows, chosen, self.saes)])
            for chosen in (self.interventions, self.direction())
        )
        before, after = (
            np.array([-float(v.mean()) for v in log_probabilities(scope.model, rows, chosen, self.saes)])
            for chosen in ([], self.interventions)
        )
        excess = bootstrap(kl - rules.side_ratio * other, seed=self.seed)
        figures = [bootstrap(values, seed=self.seed) for values in (kl, other, after - before)]
        moved = self._moved(tokens.input_ids, tokens.attention_mask)
        return SideEffects(figures[0], figures[1], figures[2], moved), excess

    def _moved(self, ids: Tensor, mask: Tensor, n: int = 5) -> tuple[Moved, ...]:
        """The other features whose mean activation changes most when the steering vector is added to every token."""
        out = []
        for layer in sorted({one.layer for one in self.interventions}):
            sae, own = self.saes[layer], [one for one in self.interventions if one.layer == layer]
            h = self._residual(ids, mask, layer)[mask.bool().to(sae.device)].float()
            vector = torch.stack([one.amount * one.vector(sae).to(h.device) for one in own]).sum(0)
            means = []
            for x in (h, h + vector):
                acts = sae.encode(x)
                total = torch.zeros(sae.d_sae, device=acts.values.device)
                means.append(total.index_add(0, acts.indices.flatten().long(), acts.values.flatten().float()) / len(x))
            change = (means[1] - means[0]).abs()
            change[[one.feature for one in own]] = 0
            largest = change.topk(min(n, sae.d_sae)).indices.tolist()
            out += [Moved(layer, f, float(means[0][f]), float(means[1][f])) for f in largest]
        return tuple(sorted(out, key=lambda m: -abs(m.after - m.before))[:n])


def _compared(
    under: _Made, plain: _Made, opposite: _Made, shuffled: list[_Made], randoms: list[_Made], seed: int
) -> dict[str, Any]:
    """The figures of the evidence that compare conditions."""
    mean = float(under.values.mean())
    return {
        "gain": bootstrap(under.values - plain.values, seed=seed),
        "over_random": difference(under.values, np.concatenate([one.values for one in randoms]), seed=seed),
        "over_each_random": sum(bool(one.values.mean() >= mean) for one in randoms),
        "over_opposite": difference(under.values, opposite.values, seed=seed),
        "over_shuffled": difference(under.values, np.array([one.values.mean() for one in shuffled]), seed=seed),
        "repetition": bootstrap(under.repeated - plain.repeated, seed=seed),
    }


def _cost(scored: list[np.ndarray]) -> float | None:
    """Perplexity over all tokens; None where there is none."""
    return perplexity(scored) if any(map(len, scored)) else None


def _check(
    interventions: Sequence[Intervention],
    prompts: Sequence[str],
    examples: Examples,
    options: ValidateOptions,
) -> None:
    if not interventions or any(one.op != "add" or one.feature is None for one in interventions):
        raise InputError("a verdict is about features that are added; give the amount that sweep proposes")
    rules = options.rules
    counts = {"prompts": len(prompts), "positive examples": len(examples.positive)}
    counts |= {"negative examples": len(examples.negative), "unrelated texts": len(examples.unrelated)}
    needed = dict.fromkeys(counts, rules.fewest)
    counts |= {"random features": options.n_random, "shuffles of the labels": options.n_shuffled}
    needed |= {"random features": rules.fewest_random, "shuffles of the labels": rules.fewest_shuffled}
    for name, count in counts.items():
        if count < needed[name]:
            raise InputError(f"{count} {name} are too few for a verdict: it takes at least {needed[name]}")

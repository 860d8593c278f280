"""`selectivity`: a concept removed through its features, beside a whole direction projected out, at equal effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.model import capture
from qwen_scope.scope import Scope
from qwen_scope.stats import Interval, bootstrap
from qwen_scope.steer import (
    Decoding,
    Intervention,
    Row,
    SAEsByLayer,
    Target,
    change_reference,
    generate,
    log_probabilities,
    next_token_kl,
    target_values,
)
from qwen_scope.text import padded

from .conditions import mean_direction
from .validate import Examples

# Halvings of the share that is searched for; the last one moves it by less than half a percent.
STEPS = 8
# Texts measured on each side; as many again find the direction.
FEWEST = 10


@dataclass(frozen=True)
class Removal:
    """What one way of removing the concept does.

    Attributes:
        name: which way.
        share: how much of the features' activation, or of the component along the direction, is taken away.
        effect: on the concept: the rise of the loss per token, or the fall of the target.
        full: the same with everything taken away.
        kl, loss: on unrelated text, per token in nats: KL(intact || removed), and the rise of the loss.
        near_kl, near_loss: the same on the negative examples.
        moved: how much of the activation of *other* features changes on unrelated text, `sum |after - before|` over
            `sum before`, at the layers that are changed.
    """

    name: str
    share: float
    effect: Interval
    full: Interval
    kl: Interval
    loss: Interval
    near_kl: Interval
    near_loss: Interval
    moved: Interval


@dataclass(frozen=True)
class Selectivity:
    """Both ways at equal effect, and what the direction costs beyond the features, text by text.

    Attributes:
        comparable: whether both ways have an effect whose interval is above zero; only then are the costs comparable.
        gap: effect of the features minus effect of the direction, which should be about zero.
        extra_kl, extra_loss, extra_moved: cost of the direction minus cost of the features, on unrelated text.
        measured_by: what the effect is.
    """

    features: Removal
    direction: Removal
    comparable: bool
    gap: Interval
    extra_kl: Interval
    extra_loss: Interval
    extra_moved: Interval
    measured_by: str
    interventions: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def selectivity(
    scope: Scope,
    interventions: Sequence[Intervention],
    examples: Examples,
    *,
    target: Target | None = None,
    decoding: Decoding | None = None,
    saes: SAEsByLayer | None = None,
    seed: int = 0,
) -> Selectivity:
    """Take the steering features away, or project the difference of means out at the same layers, and compare the cost.

    The stronger way is weakened until both do the same to the concept: a share of the activation (`scale`) or a share
    of the component (directional ablation) is taken away. The direction comes from every other example; all figures
    are measured on the rest. Made for measuring: how much of a model a removal takes along with the concept.

    Args:
        interventions: what names the features, their layers and `where`; amounts and operations do not matter.
        examples: with the concept, without it but otherwise alike, and unrelated.
        target: falls as the concept goes, measured on continuations of the first halves of positive examples; by
            default the loss on their second halves rises.

    Raises:
        InputError: too few examples, no feature, or examples that do not differ.
    """
    chosen = {(one.layer, one.feature, str(one.where)): one for one in interventions if one.feature is not None}
    if not chosen:
        raise InputError("selectivity is about features: name at least one")
    for name, texts in asdict(examples).items():
        if len(texts) < 2 * FEWEST:
            raise InputError(f"{len(texts)} {name} texts are too few to compare removals: it takes {2 * FEWEST}")
    run = _Run(scope, list(chosen.values()), examples, target, decoding, saes or scope.saes, seed)
    ways = {"its features": run.through_features, "the direction": run.along_directions}
    full = {name: run.effect(way(1.0)) for name, way in ways.items()}
    goal = min(float(values.mean()) for values in full.values())
    shares = {
        name: 1.0 if float(full[name].mean()) == goal else share_for(partial(run.mean_effect, way), goal)
        for name, way in ways.items()
    }
    made = {name: run.measured(name, ways[name](shares[name]), shares[name], full[name]) for name in ways}
    (first, a), (second, b) = made.values()

    def minus(key: str, x: dict[str, np.ndarray], y: dict[str, np.ndarray]) -> Interval:
        return bootstrap(x[key] - y[key], seed=seed)

    return Selectivity(
        first,
        second,
        first.effect.low > 0 and second.effect.low > 0,
        minus("effect", a, b),
        minus("kl", b, a),
        minus("loss", b, a),
        minus("moved", b, a),
        "fall of the target" if target is not None else "rise of the loss on the concept's texts, nats per token",
        tuple(one.to_json() for one in run.through_features(shares["its features"])),
    )


def share_for(effect_of: Callable[[float], float], goal: float, most: float = 1.0, steps: int = STEPS) -> float:
    """The share, from 0 to `most`, at which an effect comes closest to a goal, by bisection.

    Args:
        effect_of: the effect of a share, which grows with it.
    """
    low, high = 0.0, most
    best = (abs(goal), 0.0)  # nothing taken away has no effect
    for _ in range(steps):
        share = (low + high) / 2
        found = effect_of(share)
        best = min(best, (abs(found - goal), share))
        low, high = (share, high) if found < goal else (low, share)
    return best[1]


class _Run:
    """One comparison at work."""

    def __init__(
        self,
        scope: Scope,
        interventions: list[Intervention],
        examples: Examples,
        target: Target | None,
        decoding: Decoding | None,
        saes: SAEsByLayer,
        seed: int,
    ) -> None:
        self.scope, self.interventions, self.saes, self.target, self.seed = scope, interventions, saes, target, seed
        self.decoding = decoding or Decoding(max_new_tokens=40)
        layers = sorted({one.layer for one in interventions})
        sides = (examples.positive[::2], examples.negative[::2])
        self.directions = {layer: mean_direction(scope, layer, *sides) for layer in layers}
        if not all(bool(d.any()) for d in self.directions.values()):
            raise InputError("the positive and the negative examples have the same mean residual: they do not differ")
        self.positive, self.near = self.rows(examples.positive[1::2]), self.rows(examples.negative[1::2])
        self.unrelated = self.rows(examples.unrelated)
        self.plain_losses = {id(rows): self.losses(rows, []) for rows in (self.positive, self.near, self.unrelated)}
        decode = scope.tokenizer.decode
        self.prompts = [str(decode(list(row.ids[: row.start]))) for row in self.positive]
        self.plain_target = self.reached([]) if target is not None else None

    def rows(self, texts: Sequence[str]) -> list[Row]:
        """The first half of a text is read, the second is scored."""
        tokens = self.scope.tokenize(list(texts), truncate=True)
        pairs = zip(tokens.input_ids, tokens.lengths, strict=True)
        return [Row(tuple(ids[:n].tolist()), n // 2) for ids, n in pairs if n > 1]

    def through_features(self, share: float) -> list[Intervention]:
        return [
            Intervention.scale(layer=one.hook_point, feature=one.feature or 0, amount=1 - share, where=str(one.where))
            for one in self.interventions
        ]

    def along_directions(self, share: float) -> list[Intervention]:
        places = {(one.hook_point, str(one.where)) for one in self.interventions}
        return [
            Intervention.ablate(layer=point, direction=self.directions[point.layer], amount=share, where=where)
            for point, where in sorted(places)
        ]

    def losses(self, rows: list[Row], interventions: Sequence[Intervention]) -> np.ndarray:
        found = log_probabilities(self.scope.model, rows, interventions, self.saes)
        return np.array([-float(values.mean()) for values in found])

    def reached(self, interventions: Sequence[Intervention]) -> np.ndarray:
        assert self.target is not None
        scope = self.scope
        made = generate(
            scope.model, scope.tokenizer, self.prompts, interventions, saes=self.saes, decoding=self.decoding
        )
        return target_values(self.target, [one.text for one in made])

    def effect(self, interventions: Sequence[Intervention]) -> np.ndarray:
        """Per positive example, how much of the concept is gone."""
        if self.plain_target is not None:
            return self.plain_target - self.reached(interventions)
        return self.losses(self.positive, interventions) - self.plain_losses[id(self.positive)]

    def mean_effect(self, way: Callable[[float], list[Intervention]], share: float) -> float:
        return float(self.effect(way(share)).mean())

    def measured(
        self, name: str, interventions: list[Intervention], share: float, full: np.ndarray
    ) -> tuple[Removal, dict[str, np.ndarray]]:
        values = {"effect": self.effect(interventions), "full": full, "moved": self.moved(interventions)}
        for prefix, rows in (("", self.unrelated), ("near_", self.near)):
            found = next_token_kl(self.scope.model, rows, interventions, self.saes)
            values[f"{prefix}kl"] = np.array([float(v.mean()) for v in found])
            values[f"{prefix}loss"] = self.losses(rows, interventions) - self.plain_losses[id(rows)]
        figures = {key: bootstrap(value, seed=self.seed) for key, value in values.items()}
        return Removal(name, share, **figures), values

    def moved(self, interventions: Sequence[Intervention]) -> np.ndarray:
        """Per unrelated text, the share of the other features' activation that the change itself moves."""
        ids, mask = padded([row.ids for row in self.unrelated])
        points = sorted({one.hook_point for one in interventions})
        residuals = capture(self.scope.model, ids, points, mask)
        changed, total = np.zeros(len(ids)), np.zeros(len(ids))
        for point in points:
            sae = self.saes[point.layer]
            here = [one for one in interventions if one.hook_point == point]
            own = [one.feature for one in self.interventions if one.hook_point == point and one.feature is not None]
            for i, row in enumerate(self.unrelated):
                h = residuals[point][i, : len(row.ids)]
                before, after = (_others(sae, x, own) for x in (h, change_reference(here, h, sae)))
                changed[i] += float((after - before).abs().sum())
                total[i] += float(before.sum())
        return changed / np.maximum(total, np.finfo(float).tiny)


def _others(sae: Any, h: Tensor, own: list[int]) -> Tensor:
    """The activations of all features but `own` on the tokens of one text."""
    acts = sae.encode(h).to_dense().float()
    acts[:, own] = 0
    return acts

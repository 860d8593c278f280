"""The controls of an intervention: changes of equal norm in other directions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, capture
from qwen_scope.scope import Scope
from qwen_scope.steer import Intervention, SAEsByLayer, StatsByLayer

# A random feature is drawn from this many that fire about as often.
NEAREST = 100
# From this multiple of the firing rate on negative examples on, a feature is of the concept itself.
CONCEPT_RATIO = 2


def fire_alike(
    feature: int,
    rates: Float[np.ndarray, " d_sae"],
    W_dec: Float[Tensor, "d_model d_sae"] | None,
    avoid: Collection[int] = (),
) -> list[int]:
    """The up to `NEAREST` other features whose firing rates are nearest to that of one, nearest first.

    Left out are silent ones, those without a direction where directions are given, and `avoid`.
    """
    fitting = np.asarray(rates) > 0
    if W_dec is not None:
        fitting &= torch.linalg.vector_norm(W_dec.detach().float(), dim=0).cpu().numpy() > 0
    fitting[[feature, *avoid]] = False
    near = np.argsort(np.abs(rates - rates[feature]), kind="stable")
    return near[fitting[near]][:NEAREST].tolist()


def of_concept(
    positive: Float[np.ndarray, " d_sae"], negative: Float[np.ndarray, " d_sae"]
) -> Bool[np.ndarray, " d_sae"]:
    """Which features are of a concept, by their firing rates on tokens with it and without."""
    return np.asarray(positive) > CONCEPT_RATIO * np.asarray(negative)


def matched_random(
    interventions: Sequence[Intervention],
    saes: SAEsByLayer,
    stats: StatsByLayer,
    rng: np.random.Generator,
    avoid: Mapping[int, Collection[int]] | None = None,
) -> list[Intervention]:
    """For each intervention another feature of its layer that fires about as often, with the same length of change.

    Args:
        interventions: additions of features, in raw units.
        stats: with firing rates.
        avoid: by layer, features that are no control: such as others of the same concept.

    Raises:
        InputError: no firing rates, or no feature that could be compared with.
    """
    out = []
    for one in interventions:
        rates = stats[one.layer].firing_rate
        if rates is None or one.feature is None:
            raise InputError("matching a feature needs the firing rates of its layer")
        of_layer = [other.feature for other in interventions if other.layer == one.layer]
        taken = {f for f in of_layer if f is not None} | set((avoid or {}).get(one.layer, ()))
        W_dec = saes[one.layer].W_dec
        fitting = fire_alike(one.feature, rates, W_dec, taken)
        if not fitting:
            raise InputError(f"layer {one.layer} has no other feature to compare with: all are of the concept")
        chosen = int(rng.choice(fitting))
        mine, other = torch.linalg.vector_norm(W_dec[:, [one.feature, chosen]].float(), dim=0)
        amount = one.amount * float(mine / other)
        out.append(Intervention.add(layer=one.hook_point, feature=chosen, amount=amount, where=str(one.where)))
    return out


def halved(positive: Sequence[str], negative: Sequence[str], rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """The examples under shuffled labels: half of each side on either side.

    A plain shuffle leaves an imbalance between the sides, which a change of equal length would amplify.
    """
    one, other = rng.permutation(list(positive)).tolist(), rng.permutation(list(negative)).tolist()
    p, q = len(one) // 2, len(other) // 2
    return one[:p] + other[:q], one[p : 2 * p] + other[q : 2 * q]


def mean_direction(
    scope: Scope, layer: int, positive: Sequence[str], negative: Sequence[str]
) -> Float[Tensor, " d_model"]:
    """Mean residual over the tokens of positive texts minus that of negative texts: the usual steering vector.

    The first token of a text is left out: its residual is an outlier that says nothing of the text.
    """
    means = []
    for texts in (positive, negative):
        tokens = scope.tokenize(list(texts), truncate=True)
        mask = tokens.attention_mask.bool().clone()
        if int(mask.sum()) > len(mask):
            mask[:, 0] = False
        point = scope.hook_point(layer)
        h = capture(scope.model, tokens.input_ids, [point], tokens.attention_mask)[point]
        means.append(h[mask.to(h.device)].float().mean(0).cpu())
    return means[0] - means[1]


def along(
    interventions: Sequence[Intervention], saes: SAEsByLayer, directions: dict[int, Tensor]
) -> list[Intervention]:
    """Replace each feature by a direction of equal norm, at the same layer and tokens."""
    lengths: dict[tuple[HookPoint, str], Tensor] = {}
    for one in interventions:
        key = (one.hook_point, str(one.where))
        change = one.amount * one.vector(saes[one.layer]).cpu()
        lengths[key] = lengths[key] + change if key in lengths else change
    out = []
    for (point, where), change in lengths.items():
        d = directions[point.layer]
        if not bool(d.any()):
            raise InputError("the positive and the negative examples have the same mean residual: they do not differ")
        amount = float(torch.linalg.vector_norm(change) / torch.linalg.vector_norm(d))
        out.append(Intervention.add(layer=point, direction=d, amount=amount, where=where))
    return out

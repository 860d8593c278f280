"""Effects of nodes on what is explained: by gradient, integrated gradients, RelP, and by ablation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError, check_count
from qwen_scope.model import Routing, has_routers, relevance
from qwen_scope.report import Progress

from .jointly import jointly
from .options import DEFAULT, Method, check_method
from .passes import along, carrying, gradients, keeping, rows_with_gradient
from .reading import Reading, keeper

# Integrated gradients halve pieces of their way until what they leave over is at most this share of what they explain,
# or as many steps are made.
TOLERANCE, MOST_STEPS = 0.01, 640


@dataclass(frozen=True, eq=False)
class Effects:
    """What each node adds to the value, to first order or integrated.

    Effects of different layers are not to be added up: what a feature does passes through those of the layers above.

    Attributes:
        method: how they were found.
        features: by layer, of every active feature, in the order of `reading.active[layer]`.
        errors: by layer, of every token's error.
        embeddings: of every token's embedding; NaN for `ig` and `joint`, which have none.
        bases: by layer, of `b_dec` at all tokens together, by gradient; for `ig` the value with the stream there.
        slopes: by layer, the gradient at the stream, `(seq, d_model)`; of plain gradients or RelP.
        gaps: by layer, for integrated gradients: what features and errors leave over of the value less its baseline.
        exact: for `exact`, the nodes that were ablated and their effects; the others have that by gradient.
    """

    method: Method
    features: Mapping[int, Float[Tensor, " n"]]
    errors: Mapping[int, Float[Tensor, " seq"]]
    embeddings: Float[Tensor, " seq"]
    bases: Mapping[int, float]
    slopes: Mapping[int, Float[Tensor, "seq d_model"]]
    gaps: Mapping[int, float]
    exact: Mapping[Place, float] = field(default_factory=dict)

    def error_share(self, layer: int) -> float:
        """Of the size of all effects at a layer, the share that runs through its errors."""
        errors = float(self.errors[layer].abs().sum())
        total = errors + float(self.features[layer].abs().sum())
        return errors / total if total else 0.0


def effects(
    reading: Reading,
    method: Method = DEFAULT,
    *,
    steps: int = 10,
    most: int = 400,
    progress: Progress | None = None,
) -> Effects:
    """The effect of every node of a prompt on its quantity.

    | method | effect of feature i of layer l at token p |
    |---|---|
    | `gradient` | `a_i (d_i . dm/dh)` (attribution patching; Marks et al. 2024, eq. 1) |
    | `relp` | the same with the rules of `model.relevance` for the backward pass (arXiv 2508.21258) |
    | `ig` | `a_i d_i` times the mean gradient while the layer's features grow from 0 to their value, the error kept |
    | `joint` | what it adds while features of all layers grow from 0 together, errors kept (see `jointly`) |
    | `exact` | `m` less `m` of a run with `a_i` at 0, of the features and errors that the gradient ranks first |

    An error's effect is likewise `e . dm/dh`. For `ig` it is the mean gradient while the errors grow from 0 with the
    features still at 0, so that both parts of the way add up: features and errors of a layer sum to the value less its
    value with that layer's stream at `b_dec` everywhere, each at Gauss-Legendre nodes. Experts stay those that the
    prompt was routed to.

    Args:
        steps: of `joint`, and of `ig` on one piece of the way; its pieces are halved where the gradient is off, until a
            layer's sum is right within 1% or `MOST_STEPS` are made.
        most: as many nodes are ablated for `exact`, each in a run of its own.

    Raises:
        InputError: no such method, a model whose kernels give no gradient, or one that RelP has no rule for.
    """
    method, steps, most = check_method(method), check_count("steps", steps), check_count("most", most)
    first = _first_order(reading, method)
    if method == "joint":
        features, errors = jointly(reading, steps, progress)
        return replace(first, method=method, features=features, errors=errors, embeddings=first.embeddings * np.nan)
    if method == "exact":
        return _exact(reading, first, most, progress)
    return first if method != "ig" else _integrated(reading, first, steps, progress)


def ruled(reading: Reading, method: str) -> AbstractContextManager[object]:
    """Around a forward pass whose backward pass follows RelP's rules, or for any other method the derivative."""
    return relevance(reading.scope.model) if method == "relp" else ExitStack()


def _first_order(reading: Reading, method: Method) -> Effects:
    kept: dict[int, Tensor] = {}
    model, blocks = reading.scope.model, reading.last_block + 1
    with torch.enable_grad(), ruled(reading, method), keeping(model, len(reading.ids), blocks):
        with carrying(model, reading.last_block):
            embeddings = reading.embeddings[None].clone().requires_grad_()
            value = reading.run(embeddings, {layer: keeper(kept, layer) for layer in reading.layers})
        first, *found = gradients(value, [embeddings, *(kept[layer] for layer in reading.layers)])
    slopes = {layer: slope[0] for layer, slope in zip(reading.layers, found, strict=True)}
    features = {layer: of_features(reading, layer, slopes[layer]) for layer in reading.layers}
    errors = {layer: (reading.errors[layer] * slopes[layer]).sum(-1) for layer in reading.layers}
    bases = {layer: float(slopes[layer].sum(0) @ reading.scope.saes[layer].b_dec.float()) for layer in reading.layers}
    return Effects(method, features, errors, (first[0] * reading.embeddings).sum(-1).float(), bases, slopes, {})


def of_features(reading: Reading, layer: int, slope: Float[Tensor, "seq d_model"]) -> Float[Tensor, " n"]:
    """What the active features of a layer add along a gradient at its stream."""
    one = reading.active[layer]
    return one.values * along(reading.scope.saes[layer], one.features, one.positions, slope[None])[0]


def _integrated(reading: Reading, first: Effects, steps: int, progress: Progress | None) -> Effects:
    features, errors, bases, gaps = {}, {}, {}, {}
    routing = Routing()
    if has_routers(reading.scope.model):
        with torch.no_grad(), routing.recording(reading.scope.model):
            reading.run(reading.copies(1))
    for n, layer in enumerate(reading.layers):
        if progress is not None:
            progress("effects", n / len(reading.layers), f"layer {layer}")
        base = reading.scope.saes[layer].b_dec.float().expand(len(reading.ids), -1)
        error = reading.errors[layer]
        whole = torch.stack([base, base + error, reading.streams[layer]])
        baseline, between, value = _values(reading, routing, layer, whole)
        allowed = TOLERANCE / 2 * abs(value - baseline)
        grown = _mean_slope(reading, routing, layer, whole[:2], (baseline, between), steps, allowed)
        slope = _mean_slope(reading, routing, layer, whole[1:], (between, value), steps, allowed)
        errors[layer] = (grown * error).sum(-1)
        features[layer] = of_features(reading, layer, slope)
        bases[layer] = baseline
        gaps[layer] = float(features[layer].sum() + errors[layer].sum()) - (reading.value - baseline)
    return Effects("ig", features, errors, first.embeddings * np.nan, bases, first.slopes, gaps)


def _mean_slope(
    reading: Reading,
    routing: Routing,
    layer: int,
    ends: Float[Tensor, "2 seq d_model"],
    values: tuple[float, float],
    steps: int,
    allowed: float,
) -> Float[Tensor, "seq d_model"]:
    """The mean gradient at a layer's stream on the straight way between two of its states.

    Along a piece of the way the gradient adds up to the difference of the values at its ends, so how far a piece is off
    is known. The worst is halved until all together are off by no more than `allowed`.
    """
    start, way = ends[0], ends[1] - ends[0]

    def piece(first: float, last: float, low: float, high: float) -> _Piece:
        slope = _over(reading, routing, layer, start + first * way, (last - first) * way, steps)
        gap = (last - first) * float((slope * way).sum()) - (high - low)
        return _Piece(first, last, low, high, (last - first) * slope, gap)

    pieces = [piece(0.0, 1.0, *values)]
    while abs(sum(one.gap for one in pieces)) > allowed and len(pieces) * steps < MOST_STEPS:
        worst = max(pieces, key=lambda one: abs(one.gap))
        pieces.remove(worst)
        middle = (worst.first + worst.last) / 2
        (value,) = _values(reading, routing, layer, (start + middle * way)[None])
        pieces.append(piece(worst.first, middle, worst.low, value))
        pieces.append(piece(middle, worst.last, value, worst.high))
    return torch.stack([one.slope for one in pieces]).sum(0)


@dataclass(frozen=True, eq=False)
class _Piece:
    """A piece of a way: its ends, the values there, the gradient over it times its length, and how far that is off."""

    first: float
    last: float
    low: float
    high: float
    slope: Tensor
    gap: float


def _over(
    reading: Reading, routing: Routing, layer: int, start: Tensor, way: Tensor, steps: int
) -> Float[Tensor, "seq d_model"]:
    """The mean gradient at a layer's stream on the way from `start` to `start + way`, at Gauss-Legendre nodes."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(start)
    kind = reading.embeddings.dtype
    model, above = reading.scope.model, reading.last_block - layer
    rows = rows_with_gradient(len(reading.ids), max(1, above))
    for at in np.array_split(np.arange(steps), -(-steps // rows)):
        shares = torch.tensor((nodes[at] + 1) / 2, dtype=torch.float32, device=start.device)[:, None, None]
        # what is computed again would be routed anew, so held routes keep what they compute
        held = routing.held(model) if routing.chosen else keeping(model, len(at) * len(reading.ids), above)
        with torch.enable_grad(), held:
            stream = (start + shares * way).to(kind).requires_grad_()
            value = reading.run(reading.copies(len(at)), {layer: _put(stream)})
            (found,) = gradients(value, [stream])
        total += (found * torch.tensor(weights[at] / 2, dtype=torch.float32, device=start.device)[:, None, None]).sum(0)
    return total


def _values(reading: Reading, routing: Routing, layer: int, streams: Tensor) -> list[float]:
    with torch.no_grad(), routing.held(reading.scope.model) if routing.chosen else ExitStack():
        return reading.run(reading.copies(len(streams)), {layer: _put(streams.to(reading.embeddings.dtype))}).tolist()


def _put(stream: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda h: stream


def _exact(reading: Reading, first: Effects, most: int, progress: Progress | None) -> Effects:
    """The gradient's effects, the largest of them replaced by what ablation says."""
    found: list[tuple[float, Place, Tensor, int]] = []
    features, errors = ({layer: x.clone() for layer, x in some.items()} for some in (first.features, first.errors))
    for layer in reading.layers:
        one = reading.active[layer]
        for n in features[layer].abs().topk(min(most, len(one))).indices.tolist():
            place = Place(layer, int(one.positions[n]), int(one.features[n]))
            found.append((abs(float(features[layer][n])), place, features[layer], n))
        for n, size in enumerate(errors[layer].abs().tolist()):
            found.append((size, Place(layer, n, None), errors[layer], n))
    chosen = sorted(found, key=lambda one: -one[0])[:most]
    measured = ablated(reading, [[place] for _, place, _, _ in chosen], progress=progress).tolist()
    for (_, _, into, n), value in zip(chosen, measured, strict=True):
        into[n] = value
    exact = {place: value for (_, place, _, _), value in zip(chosen, measured, strict=True)}
    return replace(first, method="exact", features=features, errors=errors, exact=exact)


@dataclass(frozen=True, order=True)
class Place:
    """One node of a layer's stream: a feature at a token, or the error there.

    Attributes:
        layer, position: where.
        feature: which feature; None for the error.
    """

    layer: int
    position: int
    feature: int | None


def ablated(
    reading: Reading,
    groups: Sequence[Sequence[Place]],
    means: Mapping[int, Float[Tensor, " d_sae"]] | None = None,
    *,
    progress: Progress | None = None,
) -> Float[Tensor, " groups"]:
    """The exact effect of groups of nodes: the value less that of a run without them.

    A feature's activation is set to 0, or to its mean, and an error to 0; everything else of that stream stays, and
    what follows is computed anew by the model.

    Args:
        means: by layer, the activation that ablated features keep.

    Raises:
        InputError: a place that is no node of this prompt.
    """
    moves = [_moves(reading, group, means) for group in groups]
    out = []
    for start in range(0, len(groups), reading.rows):
        if progress is not None:
            progress("ablation", start / len(groups), f"{len(groups)} nodes")
        some = moves[start : start + reading.rows]
        layers = {layer for move in some for layer in move}
        changes = {layer: _moved([move.get(layer, []) for move in some]) for layer in layers}
        with torch.no_grad():
            out.append(reading.value - reading.run(reading.copies(len(some)), changes).float())
    return torch.cat(out) if out else torch.zeros(0)


Move = dict[int, list[tuple[int, Tensor]]]


def _moves(reading: Reading, group: Sequence[Place], means: Mapping[int, Tensor] | None) -> Move:
    """By layer: at which tokens what is added to the stream."""
    found: Move = {}
    for place in group:
        if place.layer not in reading.layers or not 0 <= place.position < len(reading.ids):
            raise InputError(f"there is no node of layer {place.layer} at position {place.position} in this prompt")
        if place.feature is None:
            step = -reading.errors[place.layer][place.position]
        else:
            one, sae = reading.active[place.layer], reading.scope.saes[place.layer]
            here = ((one.positions == place.position) & (one.features == place.feature)).nonzero()
            if not len(here):
                raise InputError(
                    f"feature {place.layer}/{place.feature} is not active at position {place.position}, so it can't be"
                    " ablated there"
                )
            kept = 0.0 if means is None else float(means[place.layer][place.feature])
            step = (kept - one.values[here[0, 0]]) * sae.W_dec[:, place.feature].float()
        found.setdefault(place.layer, []).append((place.position, step))
    return found


def _moved(rows: Sequence[Sequence[tuple[int, Tensor]]]) -> Callable[[Tensor], Tensor]:
    def change(h: Tensor) -> Tensor:
        new = h.to(torch.promote_types(h.dtype, torch.float32), copy=True)
        for row, steps in enumerate(rows):
            for position, step in steps:
                new[row, position] += step
        return new.to(h.dtype)

    return change

"""The norm above which a token is a sink, per hook point, measured on a sample of ordinary text.

A sink is a token with a massive activation: the first token of a row, and at some layers a few later ones, share one
large vector and draw attention that the heads have no other use for. No multiple of the median separates sinks at every
layer: SmolLM2's lie at 3 to 10 medians in layers 2 to 8 and at 100 to 200 in layers 11 to 25, while commas of Gemma 3's
layer 0 lie at 8 to 20 and draw no more attention than other tokens. Two properties do:

- the bulk of the norms is narrow, so the distance from its median to its 90th percentile, on a logarithmic scale, says
  how far ordinary norms reach;
- a sink stays a sink from the block that writes it to the block that removes it, so tokens above the bulk at one layer
  are above it at a neighbouring layer too. What is large at a single layer is the embedding of ordinary tokens.

The edge of a wide bulk lies above the shorter sinks (at 2.9 medians at SmolLM2's layer 4, where sinks begin at 2).
Between twice the median and that edge the tail of a bulk thins out, while that of sinks grows towards the edge and is
made of tokens that are sinks at a neighbouring layer. Where it is the sinks', the threshold is twice the median.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float

from qwen_scope.errors import FormatError, InputError, brief

UPPER = 0.9
"""The quantile of the norms that marks the upper side of their bulk."""

WIDTHS = 4.0
"""How many times the logarithmic distance from the median to that quantile ordinary norms may lie above the median."""

FLOOR = 2.0
"""No token below this multiple of the median is a sink."""

MARGIN = 1.5
"""How many times that edge the threshold may be where the sample has no sink but the first tokens of its rows."""

STAYS = 0.5
"""The least share of the norm above the threshold that is of tokens above it at a neighbouring hook point too."""

RARE = 0.03
"""Without a measured neighbour: the largest share of tokens above the threshold that can be sinks."""

LEAST = 100
"""The fewest ordinary tokens that thresholds are measured on."""

_POINT = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.([a-z_]+)")


def point_name(point: object) -> str:
    """The name of a hook point, such as `layers.12.resid_post`; a number means the residual after that layer.

    Raises:
        InputError: it is neither a layer nor a hook point's name.
    """
    name = f"layers.{point}.resid_post" if isinstance(point, int) and not isinstance(point, bool) else str(point)
    if not _POINT.fullmatch(name):
        raise InputError(f"a hook point is a layer or a name such as 'layers.12.resid_post', not {brief(point)}")
    return name


def neighbours(name: str) -> tuple[str, str]:
    """The same stream one layer before and one layer after."""
    match = _POINT.fullmatch(name)
    assert match is not None
    layer, stream = int(match[1]), match[2]
    return f"layers.{layer - 1}.{stream}", f"layers.{layer + 1}.{stream}"


def thresholds(
    norms: Mapping[str, Float[np.ndarray, " tokens"]],
    ordinary: Bool[np.ndarray, " tokens"],
    opening: Bool[np.ndarray, " tokens"],
) -> dict[str, float | None]:
    """For each hook point the norm above which a token is a sink, or None where norms tell no sinks apart.

    Measure all layers of a model at once: a layer is judged with the help of its neighbours. Where neither was
    measured, tokens above the bulk are sinks if they are at most 3% of all.

    Where the sample has no token above the bulk but its rows' first tokens lie above it, other texts may have a later
    sink: the threshold is then halfway, on a logarithmic scale, between the bulk and the first tokens, and at most 1.5
    times the edge of the bulk.

    A threshold above twice the median is lowered to it where the tokens between the two are the tail of the sinks:
    those that are no sinks at a neighbouring hook point are at most as many as the others and those in a band of the
    same width, on a logarithmic scale, above the threshold.

    Args:
        norms: residual norms by hook point name, of the same tokens in the same order.
        ordinary: tokens that may be sinks by their norm alone: neither at the beginning of a row nor special.
        opening: first tokens of rows.

    Raises:
        InputError: fewer than 100 ordinary tokens, or arrays of different lengths.
        FormatError: a norm is negative or NaN; an infinite one is taken as large.
    """
    if not norms:
        raise InputError("there are no norms to measure thresholds on")
    if int(ordinary.sum()) < LEAST:
        raise InputError(
            f"thresholds for sinks are measured on at least {LEAST} ordinary tokens, not {int(ordinary.sum())};"
            " give a longer sample"
        )
    limits, above = {}, {}
    for name, raw in norms.items():
        size = np.asarray(raw, np.float64)
        if size.shape != ordinary.shape or size.shape != opening.shape:
            raise InputError(f"{name} has norms of {len(size)} tokens; the sample has {len(ordinary)} tokens")
        if np.isnan(size).any() or (size < 0).any():
            raise FormatError(
                f"a residual norm at {name} is no number from 0 up; load the model in bfloat16 or float32"
            )
        limits[name] = _edge(size[ordinary])
        above[name] = size[ordinary] > limits[name]
    found = {
        name: _threshold(name, np.asarray(raw, np.float64), ordinary, opening, limits[name], above)
        for name, raw in norms.items()
    }
    return _lowered({name: np.asarray(raw, np.float64)[ordinary] for name, raw in norms.items()}, found)


def _edge(bulk: np.ndarray) -> float:
    """The upper end of ordinary norms; infinite where the sample gives none."""
    middle, upper = np.quantile(bulk, [0.5, UPPER], method="lower")  # no arithmetic between infinite norms
    if not 0 < middle < np.inf or not upper < np.inf:
        return np.inf
    with np.errstate(over="ignore"):  # norms without a bulk have no end
        return float(middle * max(FLOOR, (upper / middle) ** WIDTHS))


def _threshold(
    name: str, size: np.ndarray, ordinary: np.ndarray, opening: np.ndarray, edge: float, above: dict[str, np.ndarray]
) -> float | None:
    if edge == np.inf:
        return None
    here = above[name]
    if not here.any():
        first = float(np.median(size[opening])) if opening.any() else 0.0
        return float(min(np.sqrt(edge * first), MARGIN * edge)) if first > edge else None
    near = [above[other][here] for other in neighbours(name) if other in above]
    if not near:
        return edge if here.mean() <= RARE else None
    # By norm, so that one real sink outweighs a few ordinary tokens just above the edge; infinite norms weigh alike.
    weight = np.minimum(size[ordinary][here] / edge, 1e6)
    return edge if weight[np.logical_or.reduce(near)].sum() >= STAYS * weight.sum() else None


def _lowered(sizes: Mapping[str, np.ndarray], found: Mapping[str, float | None]) -> dict[str, float | None]:
    """The thresholds, at twice the median where sinks reach below the one found.

    Between the two lies the tail of the bulk, which thins out, or that of the sinks, whose tokens are sinks at a
    neighbour too. It is that of the sinks if its tokens that are no sinks at a neighbour are at most as many as the
    others and those in a band of the same width above.
    """
    limits = dict(found)
    least = {name: FLOOR * float(np.quantile(size, 0.5, method="lower")) for name, size in sizes.items()}
    changed = True
    while changed:  # a neighbour's lower threshold makes more tokens known
        changed = False
        for name, size in sizes.items():
            limit = limits[name]
            if limit is None or limit <= least[name]:
                continue
            known = np.zeros(len(size), bool)
            for other in neighbours(name):
                if (far := limits.get(other)) is not None:
                    known |= sizes[other] > far
            between = (size > least[name]) & (size <= limit)
            beyond = (size > limit) & (size <= limit * (limit / least[name]))
            if between.any() and (between & ~known).sum() <= (between & known).sum() + beyond.sum():
                limits[name], changed = least[name], True
    return limits

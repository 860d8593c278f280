"""`steering`: interventions at work while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.model import HookPoint, LayerStats, blocks, changing, d_model, n_layers, token_positions
from qwen_scope.sae import SAE

from .change import Change, changed, check_together, grouped
from .intervention import Intervention
from .phases import RowPhases


@runtime_checkable
class SAEsByLayer(Protocol):
    """Anything that gives the SAE of a layer as `saes[layer]`: a dict, or the `saes` of a scope."""

    def __getitem__(self, layer: int, /) -> SAE: ...


@runtime_checkable
class StatsByLayer(Protocol):
    """Anything that gives the statistics of a layer as `stats[layer]`."""

    def __getitem__(self, layer: int, /) -> LayerStats: ...


@contextmanager
def steering(
    model: nn.Module,
    interventions: Sequence[Intervention],
    saes: SAEsByLayer | None = None,
    stats: StatsByLayer | None = None,
    *,
    prompt_lengths: Sequence[int] | None = None,
    phases: RowPhases | None = None,
) -> Iterator[None]:
    """Within the block, the model runs under the interventions; afterwards no hook remains.

    Positions stay right under a KV cache, left padding and prompts fed in chunks. Felt by this context alone: another
    thread may steer the same model differently at the same time.

    Args:
        saes, stats: where features and units come from; each is only asked for layers that need it.
        prompt_lengths: tokens of the prompt of each row of the batch, padding not counted; a token from there on is
            generated. None: every token belongs to the prompt.
        phases: the phases of the tokens of each row, for interventions at phases.

    Raises:
        NotFoundError: a layer the model does not have, or one without an SAE.
        InputError: a feature out of range, statistics that are missing, interventions that contradict each other, or
            tokens to choose in a model that does not tell its blocks their positions, or by phases that are not given.
        MismatchError: an SAE or a direction that does not fit.
    """
    changes = prepare(model, interventions, saes, stats, prompt_lengths=prompt_lengths, phases=phases)
    with changing(model, changes):
        yield


def prepare(
    model: nn.Module,
    interventions: Sequence[Intervention],
    saes: SAEsByLayer | None = None,
    stats: StatsByLayer | None = None,
    *,
    prompt_lengths: Sequence[int] | None = None,
    phases: RowPhases | None = None,
) -> dict[HookPoint, Callable[[Tensor, HookPoint], Tensor]]:
    """The functions that `steering` hands to `changing`, one per hook point where anything may change."""
    resolved = resolve(model, interventions, saes, stats)
    layers = blocks(model)
    prepared = {}
    for point in sorted({one.hook_point for one in resolved}):
        parameter = next(layers[point.layer].parameters())
        here = [one for one in resolved if one.hook_point == point]
        sae = _sae(saes, point.layer) if any(one.feature is not None for one in here) else None
        changes = grouped(here, sae, parameter.device, _dtype(model))
        if changes:
            lengths = None if prompt_lengths is None else torch.tensor(prompt_lengths, device=parameter.device)[:, None]
            prepared[point] = _changer(changes, lengths, phases)
    return prepared


def resolve(
    model: nn.Module,
    interventions: Sequence[Intervention],
    saes: SAEsByLayer | None = None,
    stats: StatsByLayer | None = None,
) -> list[Intervention]:
    """The interventions in raw units, each checked against the model and its SAE."""
    check_together(interventions)
    count, width = n_layers(model), d_model(model)
    resolved = []
    for one in interventions:
        if one.layer >= count:
            raise NotFoundError(f"there is no layer {one.layer}: the model has layers 0 to {count - 1}")
        sae = _sae(saes, one.layer) if one.feature is not None else None
        if len(one.vector(sae)) != width:
            raise MismatchError(f"a vector of {len(one.vector(sae))} numbers does not fit a residual of {width}")
        resolved.append(one.resolve(_stats(stats, one) if one.needs_stats else None, sae))
    return resolved


def _changer(
    changes: list[Change], lengths: Tensor | None, phases: RowPhases | None
) -> Callable[[Tensor, HookPoint], Tensor]:
    """What runs at every forward pass."""
    if len(changes) == 1 and changes[0].where.everywhere:
        (only,) = changes
        return lambda h, point: only(h, None)

    def change(h: Tensor, point: HookPoint) -> Tensor:
        positions = token_positions()
        if positions is None:
            raise InputError(f"the model does not tell positions at {point}; steer it at all tokens, or not at all")
        if lengths is not None and len(h) != len(lengths):
            raise InputError(f"a batch of {len(h)} rows, but the prompts of {len(lengths)} were announced")
        positions = positions.to(h.device).expand(*h.shape[:2])
        ends = torch.full((len(h), 1), 2**62, device=h.device) if lengths is None else lengths
        told = phases.at(positions) if phases is not None and any(one.where.by_phase for one in changes) else None
        masks = [None if one.where.everywhere else one.where.mask(positions, ends, told) for one in changes]
        return changed(h, changes, masks)

    return change


def _sae(saes: SAEsByLayer | None, layer: int) -> SAE:
    if saes is None:
        raise InputError(f"steering a feature of layer {layer} needs its SAE")
    try:
        return saes[layer]
    except KeyError:
        raise NotFoundError(f"there is no SAE for layer {layer}") from None


def _stats(stats: StatsByLayer | None, one: Intervention) -> LayerStats:
    if stats is None:
        raise InputError(f"the unit {one.unit!r} needs the statistics of layer {one.layer}")
    try:
        return stats[one.layer]
    except KeyError:
        raise NotFoundError(f"there are no statistics of layer {one.layer}") from None


def _dtype(model: nn.Module) -> torch.dtype:
    return getattr(model, "dtype", None) or next(model.parameters()).dtype

"""`Compiled`: a request's interventions, prepared for the two ways in which a block can be changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.steer import Change, Intervention, SAEsByLayer, grouped

from .protocol import fingerprint
from .rows import MOST_WHERES, Pattern


@dataclass(frozen=True, eq=False)
class Compiled:
    """Interventions with raw amounts.

    A layer where everything is an `add` is served by a row of its table for each code, so it costs one look-up in the
    graph whatever was asked. Any other layer is served by its changes, all of them: they read the same residual.

    Attributes:
        key: the fingerprint of the interventions.
        adds: which of the sums apply to a token.
        vectors: per layer the sums as (bit of `adds`, vector in the model's dtype).
        sets: per layer its changes in order, and the pattern of their places.
    """

    key: str
    adds: Pattern
    vectors: dict[int, list[tuple[int, Tensor]]]
    sets: dict[int, tuple[list[Change], Pattern]]

    @classmethod
    def of(
        cls,
        interventions: Sequence[Intervention],
        saes: SAEsByLayer,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Compiled:
        """Prepare them for a residual of this device and dtype.

        Raises:
            InputError: an amount that overflows the dtype, a feature that writes nothing, or more different `where`
                than a code has bits.
            MismatchError, NotFoundError: as in `Intervention.vector` and `saes[layer]`.
        """
        place = torch.device(device)
        layers: dict[int, list[Intervention]] = {}
        for one in interventions:
            layers.setdefault(one.layer, []).append(one)
        summed: dict[int, list[Change]] = {}
        sets: dict[int, tuple[list[Change], Pattern]] = {}
        for layer, here in sorted(layers.items()):
            sae = saes[layer] if any(one.feature is not None for one in here) else None
            changes = grouped(here, sae, place, dtype)
            if all(one.op == "add" for one in here):
                summed[layer] = changes
            elif changes:
                sets[layer] = changes, _bounded(Pattern.of(change.where for change in changes))
        adds = _bounded(Pattern.of(change.where for changes in summed.values() for change in changes))
        vectors = {
            layer: [(adds.wheres.index(change.where), change.vector) for change in changes if change.vector is not None]
            for layer, changes in summed.items()
        }
        return cls(fingerprint(interventions), adds, vectors, sets)

    def vector(self, layer: int, code: int) -> Tensor | None:
        """What is added at a layer to a token of this code, or None."""
        here = [vector for bit, vector in self.vectors.get(layer, ()) if code >> bit & 1]
        return torch.stack(here).sum(0) if here else None

    def added(self) -> dict[int, list[Tensor]]:
        """Every vector that is added to some token, by layer."""
        alone = {layer: [vector for _, vector in here] for layer, here in self.vectors.items()}
        beside = {
            layer: [change.vector for change in changes if change.vector is not None]
            for layer, (changes, _) in self.sets.items()
        }
        return alone | beside

    @property
    def rows(self) -> int:
        """The most rows of the tables that one request with these interventions can need."""
        return len(self.adds.possible())


def _bounded(pattern: Pattern) -> Pattern:
    if len(pattern.wheres) > MOST_WHERES:
        raise InputError(
            f"the interventions name {len(pattern.wheres)} different places, of which a request may have {MOST_WHERES}"
        )
    return pattern

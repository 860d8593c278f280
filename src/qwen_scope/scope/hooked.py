"""Features and interventions while somebody else's code runs the model: TransformerLens, nnsight, one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.model import HookPoint, d_model, n_layers, reading, unwrapped
from qwen_scope.sae import FeatureActs
from qwen_scope.steer import Intervention, steering

from .given import Layers


@runtime_checkable
class Opened(Protocol):
    """What a scope has that hooks need."""

    model: Any
    saes: Any
    stats: Any
    d_model: int
    n_layers: int

    def hook_point(self, layer: int) -> HookPoint: ...

    def check_layers(self, layers: Layers) -> list[int]: ...


@final
class HookedFeatures:
    """What the SAEs see while a model runs inside of `Scope.hooks`.

    Attributes:
        passes: per layer the activations of each forward pass, in order, each `(batch, seq, k)`; with a KV cache all
            passes but the first have the new tokens alone. Padding is encoded like any token.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.passes: dict[int, list[FeatureActs]] = {layer: [] for layer in layers}

    def __getitem__(self, layer: int) -> FeatureActs:
        """The activations of the last forward pass at a layer, `(batch, seq, k)`.

        Raises:
            NotFoundError: a layer that is not read.   InputError: the model has not run yet.
        """
        if layer not in self.passes:
            raise NotFoundError(f"layer {layer} is not read here; layers= gives {', '.join(map(str, self.passes))}")
        if not self.passes[layer]:
            raise InputError("the model has not run inside of the block yet")
        return self.passes[layer][-1]

    def __repr__(self) -> str:
        told = ", ".join(f"layer {layer}: {len(some)} passes" for layer, some in self.passes.items())
        return f"HookedFeatures({told})"

    def clear(self) -> None:
        """Forget all passes, such as between two prompts of a long loop."""
        for some in self.passes.values():
            some.clear()


@contextmanager
def hooked(
    scope: Opened, model: Any, interventions: Intervention | Sequence[Intervention], layers: Layers
) -> Iterator[HookedFeatures]:
    """See `Scope.hooks`."""
    inner = scope.model if model is None else unwrapped(model)
    if (d_model(inner), n_layers(inner)) != (scope.d_model, scope.n_layers):
        raise MismatchError(
            f"this model has {n_layers(inner)} layers of {d_model(inner)} dimensions, the scope's model"
            f" {scope.n_layers} of {scope.d_model}"
        )
    wanted = scope.check_layers(layers)
    found = HookedFeatures(wanted)

    def receive(point: HookPoint, h: Tensor) -> None:
        with torch.no_grad():
            sae = scope.saes[point.layer]
            found.passes[point.layer].append(sae.encode(h.detach().to(sae.device)))

    points = [scope.hook_point(layer) for layer in wanted]
    changes = [interventions] if isinstance(interventions, Intervention) else interventions
    with steering(inner, changes, scope.saes, scope.stats), reading(inner, points, receive):
        yield found

"""One layer's step: choose, reconstruct, differentiate, update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_scope.errors import QwenScopeError
from qwen_scope.model import HookPoint
from qwen_scope.sae import SAE
from qwen_scope.text import Counted

from . import losses
from .architectures.base import Batch
from .config import TrainConfig
from .initial import continued, fresh
from .parallel import Ranks
from .weights import Weights


class DivergedError(QwenScopeError):
    """A loss or a residual that is not a finite number."""


@dataclass(eq=False)
class Layer:
    """Everything that changes while one SAE is trained.

    Attributes:
        name: the hook point.
        silent: tokens since each feature last fired, `(d_sae,)` int64.
        tokens, dropped: how many were trained on, how many were left out as sinks, over all ranks.
    """

    name: str
    weights: Weights
    optimiser: torch.optim.Adam
    silent: Tensor
    tokens: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class LayerReport:
    """What one step says about one layer.

    Attributes:
        loss: what the step lowers: the architecture's loss and the weighted AuxK.
        fvu: fraction of variance unexplained on this batch, before the step.
        aux: AuxK before its weight, 0 while nothing is dead.
        l0: active features per token.
        dead: share of the features that are dead.
        dropped: tokens left out as sinks so far.
    """

    loss: float
    fvu: float
    aux: float
    l0: float
    dead: float
    dropped: int


EVERYTHING = Counted.everything()


def start(
    config: TrainConfig, name: str, x: Tensor, ranks: Ranks, sae: SAE | None = None, counted: Counted = EVERYTHING
) -> Layer:
    """A layer before its first step, from its first batch `(n, d_model)`, new or continuing a finished SAE."""
    kind, shape = config.kind, config.shape
    ordinary = without_sinks(counted, name, ranks.all_rows(x))
    if sae is None:
        weights = fresh(config, name, ordinary, ranks)
        # Every rank has all rows here, so only slices of the dictionary are left to agree.
        slices = ranks if ranks.mode == "features" else Ranks()
        weights.extra = kind.extra(shape, weights, ordinary * weights.scale, slices)
    else:
        kind.accept(sae)
        weights = continued(config, sae, ordinary, ranks)
        weights.extra = kind.extra_of(shape, weights, sae)
    silent = torch.zeros(weights.d_sae, dtype=torch.int64, device=x.device)
    return Layer(name, weights, adam(config, weights), silent)


def adam(config: TrainConfig, weights: Weights) -> torch.optim.Adam:
    """The optimiser of one layer."""
    parameters = list(weights.parameters().values())
    return torch.optim.Adam(parameters, lr=config.peak_lr, betas=config.betas, eps=config.eps, fused=True)


def without_sinks(counted: Counted, name: str, x: Tensor) -> Tensor:
    """The rows whose norm is at most the threshold of the hook point; those that are not finite stay, to be found."""
    sinks = counted.sinks(x, HookPoint.parse(name))
    return x[~sinks | ~x.isfinite().all(1)] if sinks.any() else x


def step(
    config: TrainConfig, layer: Layer, rows: Tensor, lr: float, ranks: Ranks, counted: Counted = EVERYTHING
) -> LayerReport:
    """Update one layer on one batch of raw residuals `(n, d_model)`, or in data-parallel training a share of it.

    Sinks by the threshold of the layer are left out, wherever they stand.

    Raises:
        DivergedError: the residuals or the loss are not finite; the weights are as before.
    """
    kind, shape, w = config.kind, config.shape, layer.weights
    kept = without_sinks(counted, layer.name, rows.to(w.b_dec.device, torch.float32))
    counts = ranks.over_rows(torch.tensor([len(rows), len(kept)], device=kept.device))
    n = int(counts[1])
    x = kept * w.scale
    batch = Batch(x, float(n), losses.total_variance(x, ranks), ranks)
    if not batch.variance.isfinite():
        raise DivergedError(f"the residuals of {layer.name} hold NaN or infinity")
    with torch.no_grad():
        values, active = kind.choose(shape, w, x, ranks)
    outcome = kind.forward(shape, w, batch, losses.pre_acts_of(w, x, values, active, ranks), active)
    dead = dead_features(config, layer)
    n_dead = int(ranks.over_features(dead.sum()))
    aux = x.new_zeros(())
    if n_dead and config.aux:
        k_aux = min(config.k_aux or w.d_model // 2, config.d_sae)
        aux = losses.aux_k(w, x, x - outcome.x_hat, dead, k_aux, batch.variance, ranks)
    loss = outcome.loss + config.aux * aux
    shown = ranks.over_rows(
        torch.stack([loss.detach(), losses.fvu(x, outcome.x_hat.detach(), batch.variance), aux.detach()])
    )
    if not shown.isfinite().all():
        raise DivergedError(f"the loss of {layer.name} is not a finite number")
    loss.backward()
    update(config, layer, lr, ranks)
    kind.after(shape, w, batch, outcome)

    fired = outcome.acts.detach() > 0
    count = torch.zeros_like(layer.silent)
    count[active.features[fired].long()] = 1
    layer.silent = torch.where(ranks.over_rows(count) > 0, 0, layer.silent + n)
    layer.tokens += n
    layer.dropped += int(counts[0]) - n
    l0 = float(ranks.over_both(fired.sum())) / max(1, n)
    loss_now, fvu_now, aux_now = shown.tolist()
    return LayerReport(loss_now, fvu_now, aux_now, l0, n_dead / config.d_sae, layer.dropped)


def dead_features(config: TrainConfig, layer: Layer) -> Tensor:
    """Which features have not fired within the window, `(d_sae,)` bool."""
    window = config.dead_window
    return layer.silent >= window if window else torch.zeros_like(layer.silent, dtype=torch.bool)


def update(config: TrainConfig, layer: Layer, lr: float, ranks: Ranks) -> None:
    """Agree on the gradients, keep the decoder on its sphere, clip, and let Adam step."""
    w = layer.weights
    for name, parameter in w.parameters().items():
        if parameter.grad is None or name in config.frozen:
            parameter.grad = torch.zeros_like(parameter)  # Adam leaves it as it is
        if ranks.mode == "data":
            parameter.grad.copy_(ranks.over_rows(parameter.grad))
    w.drop_parallel_gradient()
    clip(config.clip, w, ranks)
    for group in layer.optimiser.param_groups:
        group["lr"] = lr
    layer.optimiser.step()
    # Freed at once, so that only one layer's gradients exist at a time.
    layer.optimiser.zero_grad(set_to_none=True)
    w.normalise()


@torch.no_grad()
def clip(most: float, weights: Weights, ranks: Ranks) -> None:
    """Shrink the gradient of all parameters together to the norm `most`."""
    grads = {name: p.grad for name, p in weights.parameters().items() if p.grad is not None}
    squares = {name: torch.linalg.vector_norm(grad).square() for name, grad in grads.items()}
    shared = squares.pop("b_dec")
    total = (ranks.over_features(torch.stack(list(squares.values())).sum()) + shared).sqrt()
    if total > most:
        for grad in grads.values():
            grad.mul_(most / total)

"""Which active features the model's next token hangs on: their effects to first order, from one backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, changing, input_device, last_logits
from qwen_scope.sae import FeatureActs
from qwen_scope.scope import Scope


def attribute(
    scope: Scope, sequences: Sequence[Sequence[int]], layers: Sequence[int] | None = None
) -> dict[int, Float[Tensor, " d_sae"]]:
    """How much each feature adds to the log-probability of the last token of sequences, by layer.

    The effect of feature f is the sum over the tokens before the last of `a_f (d_f . grad log p)`: what ablating it
    everywhere would take away, if the model were linear (attribution patching, Nanda 2023, on SAE features as in Marks
    et al. 2024, eq. 1). Effects of several layers are not to be added up: what a feature does passes through those
    of the layers behind it. The mean over the sequences is returned, on the CPU.

    Args:
        sequences: token ids, a prompt and the token in question; each at least 2 long.

    Raises:
        InputError: no sequence, or one of fewer than two tokens.
        NotFoundError: a layer that has no SAE.
    """
    if not sequences or min(map(len, sequences)) < 2:
        raise InputError("attribution needs sequences of at least two tokens: some text, and the token in question")
    points = [scope.hook_point(layer) for layer in scope.check_layers(layers)]
    place = input_device(scope.model)
    totals = {point.layer: torch.zeros(scope.saes[point.layer].d_sae) for point in points}
    for ids in sequences:
        active: dict[HookPoint, FeatureActs] = {}

        def through_features(h: Tensor, point: HookPoint, active: dict[HookPoint, FeatureActs] = active) -> Tensor:
            sae = scope.saes[point.layer]
            found = sae.encode(h.detach())
            values = found.values.clone().requires_grad_()
            active[point] = FeatureActs(found.indices, values, found.width)
            decoded = sae.decode(active[point])
            return h + (decoded - decoded.detach()).to(h.dtype)  # h to the bit, and a way for gradients

        with torch.enable_grad(), changing(scope.model, dict.fromkeys(points, through_features)):
            logits = last_logits(scope.model, input_ids=torch.tensor([ids[:-1]], device=place))[0]
        said = logits.float().log_softmax(-1)[ids[-1]]
        gradients = torch.autograd.grad(said, [active[point].values for point in points])
        for point, gradient in zip(points, gradients, strict=True):
            acts = active[point]
            effects = (acts.values.detach() * gradient).flatten().float().cpu()
            totals[point.layer].index_add_(0, acts.indices.flatten().long().cpu(), effects)
    return {layer: total / len(sequences) for layer, total in totals.items()}

"""What to say when a model gives NaN or infinity where it should give the next token's scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, decoder, input_device, n_layers, reading

from .intervention import Intervention
from .phases import RowPhases
from .steering import SAEsByLayer, StatsByLayer, steering


class NotFinite(Exception):
    """Scores that can't choose a token. `ids`: the row up to there, padding included; `row`: its place in the batch."""

    def __init__(self, row: int, ids: Tensor) -> None:
        super().__init__(row)
        self.row, self.ids = row, ids


class CheckFinite(LogitsProcessor):
    """Stands first: refuses a row whose highest score is NaN or infinite. Tokens ruled out with minus infinity are
    no fault."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = ~scores.amax(-1).isfinite()
        if bad.any():
            row = int(bad.nonzero()[0])
            raise NotFinite(row, input_ids[row])
        return scores


def explained(
    model: nn.Module,
    ids: Sequence[int] | Tensor,
    interventions: Sequence[Intervention] = (),
    saes: SAEsByLayer | None = None,
    stats: StatsByLayer | None = None,
    *,
    prompt_length: int | None = None,
    phases: RowPhases | None = None,
) -> InputError:
    """The error for one row of tokens, without padding, whose scores are not finite; it names the first bad layer.

    Args:
        prompt_length, phases: of this row, as in `steering`.
    """
    row = torch.as_tensor(ids, dtype=torch.long)[None].to(input_device(model))
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    layer = first_bad_layer(model, row)
    if layer is None and interventions:
        lengths = None if prompt_length is None else [prompt_length]
        with steering(model, interventions, saes, stats, prompt_lengths=lengths, phases=phases):
            layer = first_bad_layer(model, row)
        at = ", ".join(str(point) for point in sorted({one.hook_point for one in interventions}))
        return InputError(
            f"what is changed at {at} makes the model's numbers overflow {dtype}"
            + (f", first after layer {layer}" if layer is not None else "")
            + "; lower the amount, or load the model with dtype float32"
        )
    where = f"the residual after layer {layer}" if layer is not None else "what the model makes of its last residual"
    return InputError(
        f"{where} holds NaN or infinity, so there is no next token; the model is loaded in {dtype}: load it with dtype"
        " bfloat16 or float32, and if that does not help, its weights are damaged"
    )


@torch.no_grad()
def first_bad_layer(model: nn.Module, row: Tensor) -> int | None:
    """The first layer after which the residual of `row (1, seq)` is not finite, or None."""
    bad: list[int] = []

    def look(point: HookPoint, h: Tensor) -> None:
        if not h.isfinite().all():
            bad.append(point.layer)

    body: Any = decoder(model)
    with reading(model, [HookPoint(layer) for layer in range(n_layers(model))], look):
        body(input_ids=row, use_cache=False)
    return min(bad, default=None)

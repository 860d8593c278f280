"""Edges: what the nodes of one layer write into the pre-activations of the next, along the stream and by the blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.report import Progress

from .effects import Place, ruled
from .options import DEFAULT, Method
from .reading import Reading, gradients


@dataclass(frozen=True, eq=False)
class Incoming:
    """What one receiver is sent, each entry in two parts that add up to `weight`: passed along, and computed.

    Attributes:
        receiver: a feature, or None for the quantity itself.
        layer: the senders' layer, or None where they are embeddings.
        value: the receiver's pre-activation, or the quantity.
        features: of every active feature of the senders' layer, in the order of `reading.active[layer]`; none where the
            senders are embeddings.
        features_passed: the part of each that the stream carries unchanged, `a_i W_enc[j] . W_dec[:, i]`.
        errors, errors_passed: of every token's error, or of its embedding.
        base: of `b_dec` at all tokens.
    """

    receiver: Place | None
    layer: int | None
    value: float
    features: Float[Tensor, " n"]
    features_passed: Float[Tensor, " n"]
    errors: Float[Tensor, " seq"]
    errors_passed: Float[Tensor, " seq"]
    base: float

    @property
    def constant(self) -> float:
        """What no sender accounts for: biases, and where the blocks are not linear."""
        return self.value - float(self.features.sum() + self.errors.sum()) - self.base


def incoming(
    reading: Reading, receivers: Sequence[Place], method: Method = DEFAULT, *, progress: Progress | None = None
) -> list[Incoming]:
    """The edges into features, in their order, and last those into the quantity.

    A receiver's pre-activation is a function of the stream of the layer taken apart before it, through the blocks
    between. The vector-Jacobian product of the pre-activation at that stream says what each direction at each token
    writes into it; the share of the identity is what the stream passes along, the rest is what the blocks compute.
    One forward pass holds copies of the prompt, one receiver each, and every layer's stream begins a new graph.

    Args:
        method: `relp` follows its rules, the others the derivative.

    Raises:
        InputError: a receiver that is an error or of a layer that was not taken apart.
    """
    for one in receivers:
        if one.feature is None or one.layer not in reading.layers:
            raise InputError(f"edges lead into features of layers {list(reading.layers)} and the target, not {one}")
    by_layer = {layer: [one for one in receivers if one.layer == layer] for layer in reading.layers}
    rows = min(reading.rows, max(1, *map(len, by_layer.values())))
    run = _Segments(reading, rows, method)
    found: dict[Place, Incoming] = {}
    for layer, ones in by_layer.items():
        for start in range(0, len(ones), rows):
            if progress is not None:
                progress("edges", len(found) / len(receivers), f"layer {layer}")
            some = ones[start : start + rows]
            found.update(zip(some, run.into(layer, some), strict=True))
    return [*(found[one] for one in receivers), run.into_value()]


class _Segments:
    """A forward pass of copies of a prompt in which the stream of every layer taken apart begins a new graph."""

    def __init__(self, reading: Reading, rows: int, method: Method) -> None:
        self.reading = reading
        self.begins: dict[int | None, Tensor] = {}
        self.ends: dict[int, Tensor] = {}
        self.directions: dict[int, Tensor] = {}  # of the senders' layer alone: they are as large as its activations
        last = reading.scope.n_layers - 1 if reading.quantity.layer is None else reading.quantity.layer

        def cut(layer: int) -> Callable[[Tensor], Tensor]:
            def begin(h: Tensor) -> Tensor:
                self.ends[layer] = h
                if layer in reading.layers:
                    self.begins[layer] = h.detach().requires_grad_()
                    return self.begins[layer]
                return h

            return begin

        with torch.enable_grad(), ruled(reading, method):
            self.begins[None] = reading.copies(rows).clone().requires_grad_()
            self.value = reading.run(self.begins[None], {layer: cut(layer) for layer in {*reading.layers, last}})
        self.last = self.begins.get(last, self.ends[last])

    def into(self, layer: int, receivers: Sequence[Place]) -> list[Incoming]:
        """The edges into some features of one layer, at most as many as there are copies."""
        reading, sae = self.reading, self.reading.scope.saes[layer]
        features = torch.tensor([one.feature for one in receivers], device=sae.device)
        positions = torch.tensor([one.position for one in receivers], device=sae.device)
        wanted = sae.W_enc[features].float()
        ends = self.ends[layer][torch.arange(len(receivers), device=sae.device), positions].float()
        pre = (ends * wanted).sum(-1)
        before = max((one for one in reading.layers if one < layer), default=None)
        (slopes,) = gradients(pre, [self.begins[before]], again=True)
        values = pre.detach() + sae.b_enc[features].float()
        pairs = zip(receivers, wanted, values.tolist(), slopes, strict=False)
        return [self._incoming(one, before, row, value, slope) for one, row, value, slope in pairs]

    def into_value(self) -> Incoming:
        """The edges into the quantity; what is passed along is read where the last block has written."""
        reading = self.reading
        before = reading.layers[-1]
        slope, at_end = gradients(self.value[0], [self.begins[before], self.last], again=True)
        row = at_end[0, reading.quantity.position]
        return self._incoming(None, before, row, reading.value, slope[0])

    def _incoming(
        self, receiver: Place | None, before: int | None, row: Tensor, value: float, slope: Tensor
    ) -> Incoming:
        reading = self.reading
        position = reading.quantity.position if receiver is None else receiver.position
        here = torch.zeros(len(reading.ids), dtype=torch.bool, device=row.device)
        here[position] = True
        if before is None:
            sent = reading.embeddings.float()
            none = torch.zeros(0, device=row.device)
            return Incoming(receiver, None, value, none, none, (sent * slope).sum(-1), (sent @ row) * here, 0.0)
        if before not in self.directions:
            self.directions = {before: reading.decoder(before)}
        active, directions = reading.active[before], self.directions[before]
        features = (directions * slope[active.positions]).sum(-1)
        mine = active.positions == position
        passed = torch.zeros_like(active.values)
        passed[mine] = directions[mine] @ row
        error = reading.errors[before]
        base = float(slope.sum(0) @ reading.scope.saes[before].b_dec.float())
        return Incoming(receiver, before, value, features, passed, (error * slope).sum(-1), (error @ row) * here, base)

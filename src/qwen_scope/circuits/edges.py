"""Edges: what the nodes of one layer write into the pre-activations of the next, along the stream and by the blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError
from qwen_scope.report import Progress

from .effects import Place, ruled
from .options import DEFAULT, Method
from .passes import along, gradients, keeping, longest_segment, rows_with_gradient
from .reading import Reading


@dataclass(frozen=True, eq=False)
class Incoming:
    """What one receiver is sent, each entry in two parts that add up to `weight`: passed along, and computed.

    Attributes:
        receiver: a feature, or None for the quantity itself.
        layer: the senders' layer, or None where they are embeddings.
        position: the receiver's token.
        value: the receiver's pre-activation, or the quantity.
        features: of every active feature of the senders' layer, in the order of `reading.active[layer]`; none where the
            senders are embeddings.
        along: of the features at the receiver's own token, from entry `start` on, the part that the stream carries
            unchanged, `a_i W_enc[j] . W_dec[:, i]`; of the others none is.
        errors: of every token's error, or of its embedding.
        error_passed: of the error at the receiver's own token, the part that is carried unchanged.
        base: of `b_dec` at all tokens.
    """

    receiver: Place | None
    layer: int | None
    position: int
    value: float
    features: Float[Tensor, " n"]
    along: Float[Tensor, " here"]
    start: int
    errors: Float[Tensor, " seq"]
    error_passed: float
    base: float

    @property
    def features_passed(self) -> Float[Tensor, " n"]:
        """The part of every feature that the stream carries unchanged."""
        out = torch.zeros_like(self.features)
        out[self.start : self.start + len(self.along)] = self.along
        return out

    @property
    def errors_passed(self) -> Float[Tensor, " seq"]:
        """The part of every error that the stream carries unchanged."""
        out = torch.zeros_like(self.errors)
        out[self.position] = self.error_passed
        return out

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
    wanted = {layer: [one for one in receivers if one.layer == layer] for layer in reading.layers}
    found = _Segments(reading, wanted, progress or (lambda *_: None)).walk(method)
    return [*(found[one] for one in receivers), found[None]]


class _Segments:
    """A forward pass of copies of a prompt in which the stream of every layer taken apart begins a new graph.

    What a segment keeps for its gradient is let go as soon as the edges into its end are known.
    """

    def __init__(self, reading: Reading, wanted: Mapping[int, Sequence[Place]], progress: Progress) -> None:
        self.reading, self.wanted, self.progress = reading, wanted, progress
        self.blocks = longest_segment(reading.layers, reading.last_block + 1)
        self.rows = min(rows_with_gradient(len(reading.ids), self.blocks), max(1, *map(len, wanted.values())))
        self.before: int | None = None
        self.begin = self.end = torch.zeros(0)
        self.found: dict[Place | None, Incoming] = {}

    def walk(self, method: Method) -> Mapping[Place | None, Incoming]:
        """The edges into every feature that is wanted, and under None those into the quantity."""
        reading, tokens = self.reading, self.rows * len(self.reading.ids)
        layers = {*reading.layers, reading.last_block}
        with torch.enable_grad(), ruled(reading, method), keeping(reading.scope.model, tokens, self.blocks):
            self.begin = reading.copies(self.rows).clone().requires_grad_()
            value = reading.run(self.begin, {layer: self._cut(layer) for layer in layers})
            slope, at_end = gradients(value[0], [self.begin, self.end])
        row = at_end[0, reading.quantity.position]  # what is passed along is read where the last block has written
        self._add([None], row[None], [reading.value], slope[:1], self._room(1))
        return self.found

    def _cut(self, layer: int) -> Callable[[Tensor], Tensor]:
        def cut(h: Tensor) -> Tensor:
            self.end = h
            if layer in self.reading.layers:
                self._into(layer, h)
                self.before, self.begin = layer, h.detach().requires_grad_()
                self.end = self.begin
                return self.begin
            return h

        return cut

    def _into(self, layer: int, h: Tensor) -> None:
        """The edges into the features that are wanted of a layer, as many at a time as there are copies."""
        sae, ones = self.reading.scope.saes[layer], self.wanted[layer]
        room = self._room(len(ones))
        for start in range(0, len(ones), self.rows):
            some = ones[start : start + self.rows]
            self.progress("edges", len(self.found) / sum(map(len, self.wanted.values())), f"layer {layer}")
            features = torch.tensor([one.feature for one in some], device=sae.device)
            positions = torch.tensor([one.position for one in some], device=sae.device)
            rows = sae.W_enc[features].float()
            pre = (h[torch.arange(len(some), device=h.device), positions].float() * rows).sum(-1)
            (slopes,) = gradients(pre, [self.begin], again=True)
            values = (pre.detach() + sae.b_enc[features].float()).tolist()
            self._add(some, rows, values, slopes[: len(some)], [one[start : start + len(some)] for one in room])

    def _room(self, n: int) -> list[Tensor]:
        """Where `n` receivers keep what features and errors send: at once, lest small pieces scatter over memory."""
        active = 0 if self.before is None else len(self.reading.active[self.before])
        device = self.reading.embeddings.device
        return [torch.empty(n, size, device=device) for size in (active, len(self.reading.ids))]

    def _add(
        self,
        receivers: Sequence[Place | None],
        rows: Float[Tensor, "n d_model"],
        values: Sequence[float],
        slopes: Float[Tensor, "n seq d_model"],
        room: Sequence[Tensor],
    ) -> None:
        """Incoming edges of some receivers from what reads the stream at their place, and their slopes before."""
        reading, before, (features, errors) = self.reading, self.before, room
        none = torch.zeros(0, device=rows.device)
        active = None if before is None else reading.active[before]
        sent, sae = reading.embeddings.float(), None
        if before is not None and active is not None:
            sent, sae = reading.errors[before], reading.scope.saes[before]
            torch.mul(active.values, along(sae, active.features, active.positions, slopes), out=features)
        errors.copy_((sent * slopes).sum(-1))
        for n, (receiver, row, value, slope) in enumerate(zip(receivers, rows, values, slopes, strict=True)):
            position = reading.quantity.position if receiver is None else receiver.position
            passed, start, base = none, 0, 0.0
            if active is not None and sae is not None:
                # active features stand in the order of tokens
                ends = torch.tensor([position, position + 1], device=row.device)
                start, stop = torch.searchsorted(active.positions, ends).tolist()
                passed = active.values[start:stop] * (row @ sae.W_dec[:, active.features[start:stop]].float())
                base = float(slope.sum(0) @ sae.b_dec.float())
            error_passed = float(sent[position] @ row)
            self.found[receiver] = Incoming(
                receiver, before, position, value, features[n], passed, start, errors[n], error_passed, base
            )

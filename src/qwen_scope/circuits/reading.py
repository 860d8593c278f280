"""`Reading`: what the streams of one prompt are made of, and forward passes of that prompt under changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope.errors import InputError, brief
from qwen_scope.model import PASS_TOKENS, HookPoint, Past, changing, input_device, last_logits
from qwen_scope.scope import Scope
from qwen_scope.text import REASONS, token_text

from .memory import check_memory
from .quantity import Quantity

NOT_CHOSEN = "not chosen"
"""Why a token has no features as nodes, where `read` was given others."""


@dataclass(frozen=True, eq=False)
class Active:
    """The active features of one layer, flat: entry n is feature `features[n]` at token `positions[n]`."""

    positions: Int[Tensor, " n"]
    features: Int[Tensor, " n"]
    values: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, eq=False)
class Reading:
    """A prompt up to the position that is asked about, taken apart: `h = W_dec a + b_dec + e` at each layer.

    At a token that does not count (the first, sinks, special ones) an SAE was not trained, so there its whole stream
    less `b_dec` is error and no feature is a node.

    Attributes:
        scope, quantity: whose, and what is asked about; its position counts from the start.
        ids, tokens: of the prompt, up to that position.
        layers: those taken apart, ascending.
        embeddings: what the first block reads, `(seq, d_model)`.
        streams, errors: by layer, `(seq, d_model)` in fp32.
        active: by layer, the features.
        left_out: by layer, why a token has no nodes: it does not count, or was not chosen; "" where it has.
        value: of the quantity.
        logits: at the position; None for a feature.
        past: what attention keeps of tokens before these, where these are the end of a prompt alone (see `tail`).
    """

    scope: Scope
    quantity: Quantity
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    embeddings: Float[Tensor, "seq d_model"]
    streams: Mapping[int, Float[Tensor, "seq d_model"]]
    errors: Mapping[int, Float[Tensor, "seq d_model"]]
    active: Mapping[int, Active]
    left_out: Mapping[int, tuple[str, ...]]
    value: float
    logits: Tensor | None
    past: Past | None = None

    @property
    def n_nodes(self) -> int:
        """How many features are active, over all layers and tokens."""
        return sum(len(one) for one in self.active.values())

    @property
    def last_block(self) -> int:
        """The last block that the quantity hangs on."""
        return self.scope.n_layers - 1 if self.quantity.layer is None else self.quantity.layer

    @property
    def rows(self) -> int:
        """How many copies of the prompt one forward pass without gradients takes."""
        return max(1, PASS_TOKENS // self.length)

    @property
    def length(self) -> int:
        """Tokens that attention reads, those before included."""
        return len(self.ids) + (0 if self.past is None else self.past.get_seq_length())

    def decoder(self, layer: int) -> Float[Tensor, "n d_model"]:
        """The direction of every active feature of a layer, times its activation."""
        one, sae = self.active[layer], self.scope.saes[layer]
        return sae.W_dec[:, one.features].T.float() * one.values[:, None]

    def run(
        self,
        embeddings: Float[Tensor, "batch seq d_model"],
        changes: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> Float[Tensor, " batch"]:
        """The quantity on every row of embeddings, with the streams of layers changed on the way."""
        return forward(self.scope, self.quantity, embeddings, changes or {}, self.past)[0]

    def copies(self, n: int) -> Float[Tensor, "n seq d_model"]:
        """The embeddings of the prompt, `n` times."""
        return self.embeddings.expand(n, *self.embeddings.shape)


def read(
    scope: Scope,
    ids: Sequence[int],
    quantity: Quantity,
    layers: Sequence[int] | None = None,
    *,
    tokens: Sequence[str] | None = None,
    positions: Sequence[int] | None = None,
) -> Reading:
    """Take a prompt apart.

    Args:
        ids: the prompt's tokens.
        positions: at which tokens features are nodes; elsewhere the whole stream is error. By default at all.
        layers: which layers are taken apart; by default all that have an SAE, and for a feature those below its own.

    Raises:
        InputError: a position past the end, SAEs that do not read the residual stream, a feature that is not active
            at the position, no layer below it, or a long prompt whose graph does not fit into memory.
        NotFoundError: a layer without an SAE.
    """
    quantity = quantity.at(len(ids))
    quantity.check(scope)
    ids = list(ids[: quantity.position + 1])
    chosen = sorted(set(scope.check_layers(layers)))
    if quantity.layer is not None:
        chosen = [layer for layer in chosen if layer < quantity.layer]
        if not chosen:
            raise InputError(f"no layer below {quantity.layer} is left to explain its feature {quantity.feature} with")
    for layer in chosen:
        if (point := scope.hook_point(layer)).stream != "resid_post":
            raise InputError(
                f"the SAE of layer {layer} reads {point.stream}; a graph needs SAEs of the residual stream"
            )
    nodes = None if positions is None else _positions(positions, len(ids))
    check_memory(scope, len(ids), chosen, None if nodes is None else len(nodes))
    embeddings = _embeddings(scope, ids)
    with torch.no_grad():
        kept: dict[int, Tensor] = {}
        value, logits = forward(scope, quantity, embeddings[None], {layer: keeper(kept, layer) for layer in chosen})
    if quantity.kind == "feature" and not float(value[0]) > 0:
        raise InputError(
            f"feature {quantity.feature} of layer {quantity.layer} is not active at position {quantity.position};"
            " name one that is (qwen-scope features shows them)"
        )
    streams, errors, active, left_out = {}, {}, {}, {}
    for layer in chosen:
        streams[layer] = kept[layer][0].float()
        left_out[layer] = _left_out(scope, ids, layer, streams[layer], nodes)
        active[layer], errors[layer] = _apart(scope, layer, streams[layer], left_out[layer])
    shown = tuple(tokens[: len(ids)]) if tokens else tuple(token_text(scope.tokenizer, i) for i in ids)
    return Reading(
        scope, quantity, tuple(ids), shown, tuple(chosen), embeddings, streams, errors, active, left_out,
        float(value[0]), None if logits is None else logits[0],
    )  # fmt: skip


def forward(
    scope: Scope,
    quantity: Quantity,
    embeddings: Tensor,
    changes: Mapping[int, Callable[[Tensor], Tensor]],
    past: Past | None = None,
) -> tuple[Float[Tensor, " batch"], Tensor | None]:
    """The quantity at its position for every row, and the logits there; gradients flow where they are enabled."""
    model = scope.model
    taken: dict[str, Tensor] = {}

    def change(h: Tensor, point: HookPoint) -> Tensor:
        new = changes[point.layer](h) if point.layer in changes else h
        if point.layer != quantity.layer:
            return new
        taken["h"] = new[:, quantity.position]
        return new.detach()  # what is above a feature plays no part, and keeps nothing for a gradient

    at = {*changes, *([] if quantity.layer is None else [quantity.layer])}
    hooks = changing(model, {HookPoint(layer): change for layer in at}) if at else ExitStack()
    with hooks:
        before = {} if past is None else {"past_key_values": past}
        logits = last_logits(model, inputs_embeds=embeddings, **before)  # the position asked about is the last
    if quantity.layer is not None:
        return quantity.of_residual(scope, taken["h"]), None
    return quantity.of_logits(logits), logits


def keeper(kept: dict[int, Tensor], layer: int) -> Callable[[Tensor], Tensor]:
    """A change that keeps a layer's stream and leaves it as it is."""

    def keep(h: Tensor) -> Tensor:
        kept[layer] = h
        return h

    return keep


def _embeddings(scope: Scope, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        place = input_device(scope.model)
        return scope.model.get_input_embeddings()(torch.tensor(ids, device=place))


def _positions(positions: Sequence[int], length: int) -> set[int]:
    """Chosen positions from the start; raises InputError for none, or one that the prompt does not have."""
    found = {one + length if one < 0 else one for one in positions}
    if not found or min(found) < 0 or max(found) >= length:
        raise InputError(f"positions of features are some of 0 to {length - 1} in this prompt, not {brief(positions)}")
    return found


def _left_out(scope: Scope, ids: Sequence[int], layer: int, stream: Tensor, nodes: set[int] | None) -> tuple[str, ...]:
    counted, point = scope.counted[layer], scope.hook_point(layer)
    sinks = counted.sinks(stream, point).cpu()
    reasons = counted.reasons(torch.tensor([list(ids)]), sinks=sinks[None])[0]
    elsewhere = set[int]() if nodes is None else set(range(len(ids))) - nodes
    said = ["" if code == 0 else REASONS[code] for code in reasons.tolist()]
    return tuple(reason or (NOT_CHOSEN if at in elsewhere else "") for at, reason in enumerate(said))


def _apart(scope: Scope, layer: int, stream: Tensor, left_out: Sequence[str]) -> tuple[Active, Tensor]:
    sae = scope.saes[layer]
    acts = sae.encode(stream)
    counts = torch.tensor([not reason for reason in left_out], device=acts.values.device)
    values = acts.values * counts[:, None]
    positions, slots = (values > 0).nonzero(as_tuple=True)
    features = acts.indices[positions, slots].long()
    error = stream - sae.decode(acts) * counts[:, None] - sae.b_dec.float() * ~counts[:, None]
    return Active(positions, features, values[positions, slots].float()), error

"""Keys and values of the tokens before, for many passes over the tokens behind them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .families import decoder, text_config


class Past(DynamicCache):
    """A cache that passes read and none adds to, so that any number of them, of any number of rows, can begin with it.

    Nothing in it changes, so blocks that read it may be computed again for a gradient.
    """

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """The kept keys and values of a layer with those of a pass behind them."""
        one: Any = self.layers[layer_idx]
        pairs = ((one.keys, key_states), (one.values, value_states))
        return tuple(torch.cat([kept.expand(len(new), -1, -1, -1), new], dim=-2) for kept, new in pairs)


def past_of(model: nn.Module, embeddings: Float[Tensor, "1 seq d_model"]) -> Past | None:
    """What attention keeps of some tokens; None for a model whose blocks keep anything else, or only of a window."""
    body = decoder(model)
    made = DynamicCache(config=text_config(model))
    if "past_key_values" not in inspect.signature(body.forward).parameters:
        return None
    with torch.no_grad():
        body(inputs_embeds=embeddings, past_key_values=made, use_cache=True)
    layers: list[Any] = made.layers
    if any(type(one) is not DynamicLayer for one in layers):
        return None
    return Past([(one.keys, one.values) for one in layers])

"""Checkpoints that SAEs of a model fit, and others of the same shape that they must not be used on.

All are Llama-like decoders whose blocks are `model.model.layers`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

# Matrices and vectors by where the residual's dimensions are: read from it by columns, written to it by rows.
READS = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITES = ("o_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")


def shuffled(model: Any) -> Any:
    """The blocks moved by one place, the last one first."""
    other = copy.deepcopy(model)
    layers = list(other.model.layers)
    moved = [layers[-1], *layers[:-1]]
    for i, layer in enumerate(moved):
        layer.self_attn.layer_idx = i
    other.model.layers = nn.ModuleList(moved)
    return other


def reset(model: Any, seed: int = 0) -> Any:
    """New weights, by the model's own way of beginning."""
    torch.manual_seed(seed)
    return type(model)(copy.deepcopy(model.config)).to(model.dtype).eval().requires_grad_(False)


def reordered(model: Any, seed: int = 0) -> Any:
    """The same function of the tokens with the residual's dimensions in another order: no text tells the two apart."""
    other = copy.deepcopy(model)
    order = torch.randperm(other.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            module = name.removesuffix(".weight")
            if module.endswith(READS):
                parameter.copy_(parameter[:, order])
            elif module.endswith((*WRITES, *NORMS)):
                parameter.copy_(parameter[order])
    return other

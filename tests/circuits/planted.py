"""Models with weights set by hand and dictionaries that are exact, so that every edge has a closed form."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qwen_scope import load_scope
from qwen_scope.sae import Identity, TopK, save_sae
from qwen_scope.scope import Scope
from qwen_scope.text import Counted

CONST, A, B, C, D, E, X, Y = range(8)
"""Dimensions of the stream: a constant, and one concept each."""
FEATURE = {A: 3, B: 5, C: 1, D: 7, E: 0, X: 2, Y: 6, CONST: 4}
"""The feature that stands for each dimension: its encoder reads half of it, its decoder writes twice."""
GATE, UP, DOWN, CARRY, SHARP, AND, SAID = 3.0, 0.7, 1.1, 0.9, 4.0, 2.0, 5.0
IDS = {one: byte_tokenizer()(one)["input_ids"][0] for one in "adxt"}
AMOUNT = {A: 2.0, D: 1.5, X: 1.0}


class NoNorm(nn.Module):
    """Leaves its input alone, so that blocks have closed forms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def slope_of_silu(x: float) -> float:
    s = 1 / (1 + math.exp(-x))
    return s * (1 + x * (1 - s))


@functools.cache
def planted() -> Scope:
    """Block 0 turns A into B (an MLP whose gate is open), block 1 carries B to later tokens as C (a head with uniform
    attention), block 2 writes E where C and D are (a gated product); E says the token "t". X is carried along only.
    """

    def wire(model: Any) -> None:
        for word, dimension in (("a", A), ("d", D), ("x", X)):
            embed(model, word, dimension, AMOUNT[dimension])
        unit(model, 0, 0, {CONST: GATE}, A, B, DOWN, UP)
        head(model, 1, B, C, CARRY)
        unit(model, 2, 0, {C: SHARP}, D, E, AND)
        says(model, "t", E, SAID)

    return wired(wire)


def embed(model: Any, word: str, dimension: int, amount: float) -> None:
    """A token brings so much of a concept."""
    model.model.embed_tokens.weight[IDS[word], dimension] = amount


def head(model: Any, layer: int, source: int, target: int, gain: float) -> None:
    """A head with uniform attention that carries one concept to later tokens as another."""
    model.model.layers[layer].self_attn.v_proj.weight[0, source] = 1.0
    model.model.layers[layer].self_attn.o_proj.weight[target, 0] = gain


def unit(
    model: Any, layer: int, n: int, gate: dict[int, float], source: int, target: int, gain: float, up: float = 1.0
) -> None:
    """One unit of an MLP: `target += gain * silu(gate . h) * up * source`."""
    mlp = model.model.layers[layer].mlp
    for dimension, weight in gate.items():
        mlp.gate_proj.weight[n, dimension] = weight
    mlp.up_proj.weight[n, source] = up
    mlp.down_proj.weight[target, n] = gain


def says(model: Any, word: str, dimension: int, gain: float) -> None:
    """A concept says a token."""
    model.lm_head.weight[IDS[word], dimension] = gain


def wired(wire: Callable[[Any], None], without: Sequence[int] = ()) -> Scope:
    """A model of three blocks without norms, whose weights are those that `wire` sets, with an exact SAE at each.

    Args:
        without: dimensions for which the SAEs have no feature, so that they are error.
    """
    config = LlamaConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    for block in model.model.layers:
        block.input_layernorm, block.post_attention_layernorm = NoNorm(), NoNorm()
    model.model.norm = NoNorm()
    model.model.embed_tokens.weight[:, CONST] = 1.0
    wire(model)
    folder = Path(tempfile.mkdtemp(prefix="qwen-scope-planted-"))
    for layer in range(3):
        save_sae(exact(layer, without), folder)
    return load_scope(model, str(folder), tokenizer=byte_tokenizer(), counted=Counted.everything())


def exact(layer: int, without: Sequence[int] = ()) -> TopK:
    W_enc, W_dec = torch.zeros(8, 8), torch.zeros(8, 8)
    for dimension, feature in ((d, f) for d, f in FEATURE.items() if d not in without):
        W_enc[feature, dimension], W_dec[dimension, feature] = 0.5, 2.0
    return TopK(
        W_enc, W_dec, torch.zeros(8), torch.zeros(8), k=8, hook_point=f"layers.{layer}.resid_post",
        identity=Identity("SAE-Res-Planted-W1K-L0_8", layer, f"{layer:064x}"),
    )  # fmt: skip

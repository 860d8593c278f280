"""Models with weights set by hand and dictionaries that are exact, so that every edge has a closed form."""

from __future__ import annotations

import functools
import math
import tempfile
from pathlib import Path

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
    config = LlamaConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    blocks = model.model.layers
    for block in blocks:
        block.input_layernorm, block.post_attention_layernorm = NoNorm(), NoNorm()
    model.model.norm = NoNorm()
    words = model.model.embed_tokens.weight
    words[:, CONST] = 1.0
    words[IDS["a"], A], words[IDS["d"], D], words[IDS["x"], X] = AMOUNT[A], AMOUNT[D], AMOUNT[X]
    blocks[0].mlp.gate_proj.weight[0, CONST] = GATE
    blocks[0].mlp.up_proj.weight[0, A] = UP
    blocks[0].mlp.down_proj.weight[B, 0] = DOWN
    blocks[1].self_attn.v_proj.weight[0, B] = 1.0
    blocks[1].self_attn.o_proj.weight[C, 0] = CARRY
    blocks[2].mlp.gate_proj.weight[0, C] = SHARP
    blocks[2].mlp.up_proj.weight[0, D] = 1.0
    blocks[2].mlp.down_proj.weight[E, 0] = AND
    model.lm_head.weight[IDS["t"], E] = SAID
    folder = Path(tempfile.mkdtemp(prefix="qwen-scope-planted-"))
    for layer in range(3):
        save_sae(exact(layer), folder)
    return load_scope(model, str(folder), tokenizer=byte_tokenizer(), counted=Counted.everything())


def exact(layer: int) -> TopK:
    W_enc, W_dec = torch.zeros(8, 8), torch.zeros(8, 8)
    for dimension, feature in FEATURE.items():
        W_enc[feature, dimension], W_dec[dimension, feature] = 0.5, 2.0
    return TopK(
        W_enc, W_dec, torch.zeros(8), torch.zeros(8), k=8, hook_point=f"layers.{layer}.resid_post",
        identity=Identity("SAE-Res-Planted-W1K-L0_8", layer, f"{layer:064x}"),
    )  # fmt: skip

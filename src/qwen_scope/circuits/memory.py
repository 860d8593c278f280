"""What a graph takes in memory beside the model and its SAEs, before it is made."""

from __future__ import annotations

from qwen_scope.errors import InputError
from qwen_scope.model import GRAPH_TOKENS, ModelSizes, model_sizes
from qwen_scope.report import size
from qwen_scope.scope import Scope, machine

FLOAT = 4
"""Bytes of what is computed in float32."""

AROUND = 512 * 2**20
"""Bytes that libraries, Python's objects and freed pieces of memory take beside what is counted."""


def graph_bytes(
    sizes: ModelSizes,
    tokens: int,
    *,
    layers: int,
    k: int,
    positions: int | None = None,
    dtype: str | None = None,
) -> int:
    """Bytes of a graph's largest step, an estimate from shapes.

    A pass keeps what every block computes on `GRAPH_TOKENS` tokens, copies of the prompt or the prompt itself where it
    is longer; beside it stand the streams, errors and gradients of each layer taken apart, and the directions of one
    layer's active features. Attention is taken to be fused, without a matrix of tokens by tokens.

    Args:
        tokens: of the prompt, up to the position asked about.
        layers: how many are taken apart.
        k: active features of a token.
        positions: how many tokens have features as nodes; by default all.
        dtype: of the model's weights; by default as they are stored.

    Raises:
        InputError: a type that weights can't have.
    """
    held = max(tokens, tokens * (GRAPH_TOKENS // tokens))
    of_blocks = held * len(sizes.blocks) * sizes.block_graph_bytes(dtype)
    of_layers = layers * FLOAT * sizes.d_model * (2 * held + 3 * tokens)
    of_features = 3 * FLOAT * sizes.d_model * k * (tokens if positions is None else positions)
    return of_blocks + of_layers + of_features + AROUND


def check_memory(scope: Scope, tokens: int, layers: list[int], positions: int | None) -> None:
    """Refuse a prompt longer than one pass whose graph does not fit beside the model.

    Raises:
        InputError: it does not.
    """
    if tokens <= GRAPH_TOKENS:
        return
    k = max(scope.saes[layer].k or 0 for layer in layers)
    kinds = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "float16"}
    parameter = next(scope.model.parameters())
    sizes, dtype = model_sizes(scope.model.config), kinds.get(str(parameter.dtype), "float32")
    needs = graph_bytes(sizes, tokens, layers=len(layers), k=k, positions=positions, dtype=dtype)
    where, has = machine()
    taken = sizes.weight_bytes(dtype) + sum(scope.saes[layer].nbytes for layer in layers)
    if needs > has - taken:
        raise InputError(
            f"a graph of {tokens:,} tokens takes about {size(needs)} and {where} has {size(max(0, has - taken))} beside"
            " the model and its SAEs; choose --positions whose features are nodes, fewer --layers, or a shorter prompt"
        )

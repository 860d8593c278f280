"""What a graph takes in memory beside the model and its SAEs, before it is made."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_scope.errors import InputError
from qwen_scope.model import KEPT_BLOCKS, PASS_TOKENS, ModelSizes, model_sizes
from qwen_scope.report import size
from qwen_scope.scope import Scope, machine

from .options import WhyOptions
from .passes import longest_segment, rows_with_gradient

FLOAT = 4
"""Bytes of what is computed in float32."""

AROUND = 16 * 2**20
"""Bytes that Python's objects, what is gathered and freed pieces of memory take beside what is counted."""


def graph_bytes(
    sizes: ModelSizes,
    tokens: int,
    *,
    layers: Sequence[int],
    k: int,
    positions: int | None = None,
    nodes: int = WhyOptions.nodes,
    dtype: str | None = None,
) -> int:
    """Bytes of a graph's largest step beside the model and its SAEs, an estimate from shapes.

    A pass keeps what blocks compute for `KEPT_BLOCKS` tokens times blocks at most; of longer prompts it keeps the
    blocks' inputs and computes one block at a time again. Where nodes are at chosen positions, keys and values of the
    tokens before are kept instead for runs that need no more. Beside it stand the streams, errors and gradients of each
    layer taken apart, and what each feature of the graph is sent. Attention is taken to be fused, without a matrix of
    tokens by tokens, as it is by default.

    Args:
        tokens: of the prompt, up to the position asked about.
        layers: those taken apart.
        k: active features of a token.
        positions: how many tokens have features as nodes; by default all.
        nodes: of the graph.
        dtype: of the model's weights; by default as they are stored.

    Raises:
        InputError: a type that weights can't have.
    """
    whole, block = len(sizes.blocks), sizes.block_graph_bytes(dtype)

    def held(blocks: int) -> int:
        tokens_held = tokens * rows_with_gradient(tokens, blocks)
        again = tokens_held * blocks > KEPT_BLOCKS  # then what a block computes stands beside its gradients
        return tokens_held * (blocks * FLOAT * sizes.d_model + 3 * block if again else (blocks + 1) * block)

    before = 0 if positions is None else sizes.cache_bytes(1, tokens, dtype)
    of_blocks = max(held(whole), held(longest_segment(sorted(layers), whole)), before)
    of_layers = len(layers) * FLOAT * sizes.d_model * 4 * tokens
    of_features = FLOAT * nodes * k * (tokens if positions is None else positions)
    return of_blocks + of_layers + of_features + AROUND


def check_memory(scope: Scope, tokens: int, layers: list[int], positions: int | None) -> None:
    """Refuse a prompt longer than one pass whose graph does not fit beside the model.

    Raises:
        InputError: it does not.
    """
    if tokens <= PASS_TOKENS:
        return
    k = max(scope.saes[layer].k or 0 for layer in layers)
    kinds = {"torch.float32": "float32", "torch.bfloat16": "bfloat16", "torch.float16": "float16"}
    parameter = next(scope.model.parameters())
    sizes, dtype = model_sizes(scope.model.config), kinds.get(str(parameter.dtype), "float32")
    needs = graph_bytes(sizes, tokens, layers=layers, k=k, positions=positions, dtype=dtype)
    where, has = machine()
    taken = sizes.weight_bytes(dtype) + sum(scope.saes[layer].nbytes for layer in layers)
    if needs > has - taken:
        raise InputError(
            f"a graph of {tokens:,} tokens takes about {size(needs)} and {where} has {size(max(0, has - taken))} beside"
            " the model and its SAEs; choose --positions whose features are nodes, fewer --layers, or a shorter prompt"
        )

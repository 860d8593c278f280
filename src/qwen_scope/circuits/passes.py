"""Passes over a model that are to give gradients, and how much of them is kept at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qwen_scope.errors import InputError, foreign
from qwen_scope.model import GRAPH_TOKENS, KEPT_BLOCKS, HookPoint, reading, recomputed
from qwen_scope.sae import SAE

UNQUANTISED = "load the model unquantised, with PyTorch's own kernels (attn_implementation sdpa or eager)"
GATHERED = 2**20
"""Numbers that are gathered from a dictionary at a time."""


def rows_with_gradient(tokens: int, blocks: int) -> int:
    """How many copies of a prompt one pass takes whose gradient goes back through so many blocks."""
    return max(1, min(GRAPH_TOKENS // tokens, KEPT_BLOCKS // (tokens * blocks)))


def longest_segment(layers: Sequence[int], blocks: int) -> int:
    """Of how many blocks the longest piece is between the embeddings, layers taken apart and the last block."""
    ends = [-1, *layers, blocks - 1]
    return max(1, *(high - low for low, high in pairwise(ends)))


def keeping(model: nn.Module, tokens: int, blocks: int) -> AbstractContextManager[object]:
    """Around a forward and its backward pass, which keeps what blocks compute, or where it is too much, their inputs.

    Args:
        tokens: of all rows together.   blocks: through how many the gradient goes back.
    """
    return recomputed(model) if tokens * blocks > KEPT_BLOCKS else ExitStack()


def pieces(n: int, each: int) -> Iterator[tuple[int, int]]:
    """Pieces of `n` things that are `each` numbers large, `GATHERED` numbers at most."""
    step = max(1, GATHERED // each)
    for start in range(0, n, step):
        yield start, min(n, start + step)


def along(
    sae: SAE, features: Int[Tensor, " n"], tokens: Int[Tensor, " n"], slopes: Float[Tensor, "rows seq d_model"]
) -> Float[Tensor, "rows n"]:
    """The slope along the direction of each feature at its token, `d_i . slope`, for every row."""
    out = torch.empty(len(slopes), len(features), device=slopes.device)
    for start, stop in pieces(len(features), (1 + len(slopes)) * sae.d_model):
        directions = sae.W_dec[:, features[start:stop]].T.float()
        out[:, start:stop] = torch.einsum("nd,rnd->rn", directions, slopes[:, tokens[start:stop]].float())
    return out


def gradients(value: Tensor, of: Sequence[Tensor], *, again: bool = False) -> list[Tensor]:
    """The gradient of a sum of values in fp32; zeros for a tensor that has no part in it.

    Args:
        again: keep the graph for another backward pass.

    Raises:
        InputError: the model's kernels give no gradient.
    """
    if not value.requires_grad:
        raise InputError(f"the model gives no gradient to explain it with: its kernels detach; {UNQUANTISED}")
    with foreign("the model gives no gradient to explain it with", InputError, UNQUANTISED):
        found = torch.autograd.grad(value.sum(), list(of), retain_graph=again, allow_unused=True)
    return [
        torch.zeros_like(x, dtype=torch.float32) if g is None else g.float() for g, x in zip(found, of, strict=True)
    ]


@contextmanager
def carrying(model: nn.Module, up_to: int) -> Iterator[None]:
    """Around a forward pass with gradients: every attention and every feed-forward layer has to carry one.

    Where only some detach, the stream around them still gives a gradient, which would be silently wrong.

    Args:
        up_to: of which blocks, from the first to this one.

    Raises:
        InputError: one does not.
    """

    def check(point: HookPoint, h: Tensor) -> None:
        if not h.requires_grad:
            raise InputError(f"{point} gives no gradient to explain the model with: its kernel detaches; {UNQUANTISED}")

    parts = [HookPoint(layer, stream) for layer in range(up_to + 1) for stream in ("attn_out", "mlp_out")]
    with reading(model, parts, check):
        yield

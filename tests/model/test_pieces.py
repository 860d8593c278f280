"""A long text in pieces against the same text in one pass, on every family, and what is never held.

Tolerance: float32 residuals of size about 3 agree within 1e-4, as in `test_capture.py`: kernels sum in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families import CONTEXT, FAMILIES, N_LAYERS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.model import HookPoint, capture, capture_pieces

POINTS = [HookPoint(layer, stream) for layer in range(N_LAYERS) for stream in ("resid_post", "mlp_out", "attn_out")]


def ids(n: int) -> torch.Tensor:
    return torch.randint(0, 250, (1, n), generator=torch.Generator().manual_seed(0))


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        sizes = [one.numel() for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [33, 7])
@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_join_to_one_pass(family: Callable[[str], PreTrainedModel], name: str, tokens: int) -> None:
    model, text = family(name), ids(CONTEXT)
    whole = capture(model, text, POINTS)
    pieces = list(capture_pieces(model, text, POINTS, tokens))
    assert [h[POINTS[0]].shape[1] for h in pieces] == [len(part) for part in torch.arange(CONTEXT).split(tokens)]
    for point in POINTS:
        joined = torch.cat([h[point] for h in pieces], 1)
        torch.testing.assert_close(joined, whole[point], atol=1e-4, rtol=1e-4)
        if point.layer:  # what comes later depends on what came before, so a forgotten piece would show
            alone = capture(model, text[:, tokens:][:, :tokens], [point])[point]
            assert (alone - whole[point][:, tokens:][:, :tokens]).abs().max() > 1e-2


def test_one_piece_is_capture_to_the_bit(family: Callable[[str], PreTrainedModel]) -> None:
    model, text = family("qwen3"), ids(20)
    (only,) = capture_pieces(model, text, POINTS, 20)
    whole = capture(model, text, POINTS)
    assert all(torch.equal(only[point], whole[point]) for point in POINTS)


def test_a_model_without_past_key_values_reads_in_one_pass() -> None:
    config = transformers.MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = transformers.MambaForCausalLM(config).eval()
    (only,) = capture_pieces(model, ids(20), [HookPoint(1)], 8)
    assert torch.equal(only[HookPoint(1)], capture(model, ids(20), [HookPoint(1)])[HookPoint(1)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_text", "gemma3_text"])
def test_neither_logits_nor_a_square_mask_are_made(name: str) -> None:
    """4,096 tokens in pieces of 64: no tensor has a quarter of the elements of 4,096 x 4,096, or of all logits."""
    n, model = 4096, FAMILIES[name]()
    model.config.max_position_embeddings = n
    with Largest() as seen:
        for _ in capture_pieces(model, ids(n), [HookPoint(N_LAYERS - 1)], 64):
            pass
    assert seen.elements <= n * 64 * 4  # the scores of a piece: 4 heads, 64 tokens, 4,096 before them
    assert seen.elements < n * n / 4
    assert seen.elements <= n * model.config.vocab_size


def test_what_is_refused(family: Callable[[str], PreTrainedModel]) -> None:
    model = family("qwen3")
    with pytest.raises(InputError, match="at least one hook point"):
        next(capture_pieces(model, ids(9), [], 4))
    with pytest.raises(InputError, match="tokens"):
        next(capture_pieces(model, ids(9), [HookPoint(0)], 0))
    with pytest.raises(NotFoundError, match="layer 9"):
        next(capture_pieces(model, ids(9), [HookPoint(9)], 4))
    with pytest.raises(InputError, match="outside the model's vocabulary"):
        next(capture_pieces(model, ids(9) + 250, [HookPoint(0)], 4))

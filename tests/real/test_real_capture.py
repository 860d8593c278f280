"""`capture` on real models equals plain hooks of PyTorch to the bit, in every layer and every stream.

A padded batch is compared with a plain forward pass of the same batch with the same mask, a text alone with one of that
text alone. The two shapes differ from each other in rounding, since kernels split a longer row differently.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qwen_scope.model import HookPoint, LoadedModel, capture, load_model
from qwen_scope.text import tokenize

TEXTS = [
    "Gravity bends the path of light.",
    "Die Donau fließt durch Wien, Bratislava, Budapest und Belgrad und mündet ins Schwarze Meer.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "今天天气很好。",
    "No.",
]
STREAMS = {"resid_post": "", "mlp_out": ".mlp", "attn_out": ".self_attn"}


@pytest.fixture(scope="module", params=["float32", "bfloat16", "auto"])
def loaded(request: pytest.FixtureRequest, gguf: Path) -> LoadedModel:
    """The model unpacked in two types, and with its weights packed as they lie in the file."""
    return load_model(gguf, device="cpu", dtype=request.param)


def plain_hooks(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor) -> dict[HookPoint, Tensor]:
    """Every stream of every block from one whole forward pass, by hooks set and removed here."""
    taken: dict[HookPoint, Tensor] = {}

    def keep(point: HookPoint):
        def hook(module, args, output):
            taken[point] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [
        model.get_submodule(f"model.layers.{layer}{part}").register_forward_hook(keep(HookPoint(layer, stream)))
        for layer in range(model.config.num_hidden_layers)
        for stream, part in STREAMS.items()
    ]
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, position_ids=positions)
    finally:
        for handle in handles:
            handle.remove()
    return taken


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_equals_plain_hooks_to_the_bit(loaded: LoadedModel, side: str) -> None:
    tokens = tokenize(loaded.tokenizer, TEXTS, max_length=None, padding_side=side)
    assert len(set(tokens.lengths)) > 3
    ids, mask = tokens.input_ids, tokens.attention_mask
    positions = (mask.cumsum(1) - 1).clamp(min=0) * mask
    expected = plain_hooks(loaded.model, ids, mask, positions)
    seen = capture(loaded.model, ids, list(expected), mask)
    here = mask.bool()
    assert [str(point) for point in expected if not torch.equal(seen[point][here], expected[point][here])] == []
    first = HookPoint(0)
    assert not torch.equal(seen[first][here], expected[HookPoint(1)][here])  # layers differ, so equality says something


def test_each_text_alone_equals_plain_hooks_to_the_bit(loaded: LoadedModel) -> None:
    for text in TEXTS[::2]:
        tokens = tokenize(loaded.tokenizer, [text], max_length=None)
        ids, mask = tokens.input_ids, tokens.attention_mask
        expected = plain_hooks(loaded.model, ids, mask, torch.arange(ids.shape[1])[None])
        for given in (None, mask):
            seen = capture(loaded.model, ids, list(expected), given)
            assert [str(point) for point in expected if not torch.equal(seen[point], expected[point])] == []


def test_a_row_of_a_batch_is_the_text_alone_but_for_rounding(loaded: LoadedModel) -> None:
    """The largest difference over a layer's largest entry: kernels sum in another order in another shape."""
    layer = HookPoint(loaded.model.config.num_hidden_layers - 1)
    tokens = tokenize(loaded.tokenizer, TEXTS, max_length=None)
    batch = capture(loaded.model, tokens.input_ids, [layer], tokens.attention_mask)[layer].float()
    for row, n in enumerate(tokens.lengths):
        alone = capture(loaded.model, tokens.input_ids[row : row + 1, :n], [layer])[layer][0].float()
        bound = 1e-4 if loaded.model.dtype == torch.float32 else 0.05
        assert (batch[row, :n] - alone).abs().max() <= bound * alone.abs().max()

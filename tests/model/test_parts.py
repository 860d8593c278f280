"""What the MLP and the attention of a block write: read and changed for what they are, in every family."""

from __future__ import annotations

import threading

import pytest
import torch
from families import FAMILIES
from torch import nn

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.model import HookPoint, blocks, capture, changing, reading, token_positions
from qwen_scope.model.families import part_of

IDS = torch.arange(1, 13).reshape(2, 6)
MODULES = {"mlp_out": ("mlp",), "attn_out": ("self_attn", "linear_attn")}


def plain_hook(model: nn.Module, layer: int, stream: str, **inputs) -> torch.Tensor:
    """What a hook of PyTorch's own sees, on a forward pass of the whole model."""
    block, seen = blocks(model)[layer], []
    module = next(getattr(block, name) for name in MODULES[stream] if hasattr(block, name))
    handle = module.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=IDS, **inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("stream", ["mlp_out", "attn_out"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_gives_what_a_plain_hook_sees(name: str, stream: str) -> None:
    model = FAMILIES[name]()
    points = [HookPoint(layer, stream) for layer in (0, 1, 3)]
    found = capture(model, IDS, [*points, HookPoint(1)])
    assert list(found) == [*points, HookPoint(1)]
    for point in points:
        assert torch.equal(found[point], plain_hook(model, point.layer, stream))
        assert not torch.allclose(found[point], found[HookPoint(1)])


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen3_5_text", "qwen3_5_moe", "llama"])
def test_the_parts_of_a_block_add_up_to_its_output(name: str) -> None:
    model = FAMILIES[name]()
    h = capture(model, IDS, [HookPoint(0), HookPoint(1), HookPoint(1, "mlp_out"), HookPoint(1, "attn_out")])
    added = h[HookPoint(0)] + h[HookPoint(1, "attn_out")] + h[HookPoint(1, "mlp_out")]
    torch.testing.assert_close(added, h[HookPoint(1)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stream", ["mlp_out", "attn_out"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen3_5_text"])
def test_a_change_of_a_part_is_a_change_of_what_it_adds(name: str, stream: str) -> None:
    model, point = FAMILIES[name](), HookPoint(3, stream)
    before = capture(model, IDS, [HookPoint(3), HookPoint(3, "mlp_out")])
    push = torch.linspace(-1, 1, 32)
    with changing(model, {point: lambda h, _: h + push}):
        after = capture(model, IDS, [HookPoint(3), HookPoint(3, "mlp_out")])
    assert not torch.allclose(before[HookPoint(3)], after[HookPoint(3)])
    if stream == "mlp_out":
        torch.testing.assert_close(after[HookPoint(3)], before[HookPoint(3)] + push, rtol=0, atol=1e-5)
    else:  # the MLP behind reads it too
        moved = after[HookPoint(3, "mlp_out")] - before[HookPoint(3, "mlp_out")]
        torch.testing.assert_close(after[HookPoint(3)], before[HookPoint(3)] + push + moved, rtol=0, atol=1e-5)
    torch.testing.assert_close(capture(model, IDS, [HookPoint(3)])[HookPoint(3)], before[HookPoint(3)])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("stream", ["mlp_out", "attn_out"])
def test_parts_know_the_positions_their_block_was_given(stream: str) -> None:
    model, seen = FAMILIES["qwen3"](), []
    with changing(model, {HookPoint(2, stream): lambda h, _: seen.append(token_positions()) or h}), torch.no_grad():
        model(input_ids=IDS, position_ids=torch.arange(7, 13)[None].expand(2, -1))
    (positions,) = seen
    assert positions.expand(2, -1).tolist() == [list(range(7, 13))] * 2
    assert token_positions() is None


def test_padding_changes_nothing() -> None:
    model, point = FAMILIES["qwen3"](), HookPoint(1, "mlp_out")
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1]], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    padded = capture(model, ids, [point], mask)[point][:, 3:]
    torch.testing.assert_close(padded, capture(model, IDS[:1], [point])[point], rtol=0, atol=1e-5)


def test_another_thread_feels_nothing() -> None:
    model, point = FAMILIES["qwen3"](), HookPoint(1, "attn_out")
    alone = capture(model, IDS, [HookPoint(3)])[HookPoint(3)]
    found = []
    with changing(model, {point: lambda h, _: h * 5}):
        thread = threading.Thread(target=lambda: found.append(capture(model, IDS, [HookPoint(3)])[HookPoint(3)]))
        thread.start()
        thread.join()
        assert not torch.equal(capture(model, IDS, [HookPoint(3)])[HookPoint(3)], alone)
    assert torch.equal(found[0], alone)


def test_gradients_flow_through_a_part() -> None:
    model, point = FAMILIES["qwen3"](), HookPoint(2, "mlp_out")
    assert capture(model, IDS, [point], grad=True)[point].requires_grad
    taken = []
    with reading(model, [point], lambda _, h: taken.append(h)):
        model(input_ids=IDS)
    assert taken[0].requires_grad


class AddsByItself(nn.Module):
    def forward(self, h, residual):
        return h + residual


@pytest.mark.parametrize(
    ("parts", "stream", "kind", "says"),
    [
        ({"fc1": nn.Linear(2, 2)}, "mlp_out", NotFoundError, "layer 4 has no mlp_out: its Module holds fc1"),
        ({"mamba": nn.Linear(2, 2)}, "attn_out", NotFoundError, "output of one of self_attn, linear_attn"),
        ({"attn": nn.Linear(2, 2), "self_attn": nn.Linear(2, 2)}, "attn_out", NotFoundError, "holds attn, self_attn"),
        ({"mlp": AddsByItself()}, "mlp_out", InputError, "AddsByItself adds the residual by itself; read resid_post"),
    ],
)
def test_a_block_without_such_a_part_is_one_sentence(parts, stream, kind, says) -> None:
    block = nn.Module()
    for name, module in parts.items():
        block.add_module(name, module)
    with pytest.raises(kind, match=says):
        part_of(block, 4, stream)

"""`capture` against plain hooks written here, on every family.

Tolerance: an unpadded batch is compared to the bit. A padded one differs from its rows alone by rounding, since kernels
split a longer row differently; float32 residuals of size about 3 agree within 1e-4 (measured: 2e-5, the largest in the
hybrids' chunked linear attention).
"""

import pytest
import torch
import transformers
from families import FAMILIES, N_LAYERS
from jaxtyping import TypeCheckError

from qwen_scope.errors import FormatError, InputError, NotFoundError
from qwen_scope.model import HookPoint, capture, positions_from_mask

FIRST, MIDDLE, LAST = HookPoint(0), HookPoint(N_LAYERS // 2), HookPoint(N_LAYERS - 1)
POINTS = [FIRST, MIDDLE, LAST]
TEXT_BLOCKS = "model.language_model.layers", "model.layers"


def plain_hooks(model, input_ids, **inputs):
    """The outputs of first, middle and last block, by hooks set and removed here, from a whole forward pass."""
    path = next(path for path in TEXT_BLOCKS if any(name == path for name, _ in model.named_modules()))
    taken = {}
    handles = [
        model.get_submodule(f"{path}.{point.layer}").register_forward_hook(
            lambda module, args, output, point=point: taken.__setitem__(point, output)
        )
        for point in POINTS
    ]
    try:
        with torch.no_grad():
            model(input_ids=input_ids, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return taken


def ids(*shape, seed=0):
    return torch.randint(0, 250, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_a_plain_hook(family, name):
    model, batch = family(name), ids(2, 13)
    expected = plain_hooks(model, batch)
    seen = capture(model, batch, POINTS)
    assert list(seen) == POINTS
    for point in POINTS:
        assert seen[point].shape == (2, 13, 32)
        assert torch.equal(seen[point], expected[point])
        assert not seen[point].requires_grad


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_a_plain_hook_in_bfloat16(name):
    model, batch = FAMILIES[name]().bfloat16(), ids(2, 5)
    expected = plain_hooks(model, batch)
    seen = capture(model, batch, POINTS)
    for point in POINTS:
        assert seen[point].dtype == torch.bfloat16
        assert torch.equal(seen[point], expected[point])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padded_rows_equal_the_rows_alone(family, name, side):
    model, lengths = family(name), [17, 9, 2, 1]
    batch, mask = ids(len(lengths), max(lengths)), torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    seen = capture(model, batch, POINTS, mask)
    as_bool = capture(model, batch, POINTS, mask.bool())
    for row in range(len(lengths)):
        kept = mask[row].bool()
        alone = plain_hooks(model, batch[row : row + 1, kept])
        for point in POINTS:
            torch.testing.assert_close(seen[point][row, kept], alone[point][0], atol=1e-4, rtol=1e-4)
            assert torch.equal(as_bool[point], seen[point])
    assert all(h.isfinite().all() for h in seen.values())


def test_left_padding_does_not_shift_learned_positions():
    config = transformers.GPT2Config(vocab_size=256, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    model, batch = transformers.GPT2LMHeadModel(config).eval(), ids(2, 9)
    mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9])
    padded, alone = capture(model, batch, [FIRST], mask)[FIRST], capture(model, batch[:1, 5:], [FIRST])[FIRST]
    torch.testing.assert_close(padded[0, 5:], alone[0], atol=1e-5, rtol=1e-5)


def test_a_bare_decoder_gives_the_same(family):
    batch = ids(2, 7)
    for name in ("qwen3", "qwen3_5", "gemma3"):
        whole, bare = (capture(model, batch, POINTS) for model in (family(name), family(name).model))
        assert all(torch.equal(whole[point], bare[point]) for point in POINTS)


def test_the_last_residual_is_not_normed(qwen3):
    batch = ids(1, 6)
    states = qwen3(batch, output_hidden_states=True).hidden_states
    seen = capture(qwen3, batch, [MIDDLE, LAST])
    assert torch.equal(seen[MIDDLE], states[MIDDLE.layer + 1])
    assert not torch.allclose(seen[LAST], states[-1], atol=1e-2)
    assert torch.allclose(qwen3.model.norm(seen[LAST]), states[-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_it_stops_after_the_deepest_block(name):
    model, called = FAMILIES[name](), []
    home = next(path for path in TEXT_BLOCKS if any(n == path for n, _ in model.named_modules()))
    for i, block in enumerate(model.get_submodule(home)):
        block.register_forward_pre_hook(lambda module, args, i=i: called.append(i))
    for module in (model.lm_head, model.get_submodule(home.rpartition(".")[0]).norm):
        module.register_forward_pre_hook(lambda module, args: called.append("past the blocks"))
    capture(model, ids(1, 4), [HookPoint(1), HookPoint(0)])
    assert called == [0, 1]
    capture(model, ids(1, 4), [LAST])
    assert called == [0, 1, 0, 1, 2, 3]


def test_it_keeps_no_cache(qwen3, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a KV cache was made")

    monkeypatch.setattr("transformers.cache_utils.DynamicCache.__init__", refuse)
    capture(qwen3, ids(1, 4), [LAST])


def test_gradients_flow_when_asked():
    model = FAMILIES["qwen3"]()
    h = capture(model, ids(1, 4), [FIRST, MIDDLE], grad=True)
    (h[FIRST].sum() + h[MIDDLE].sum()).backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert model.model.layers[MIDDLE.layer + 1].mlp.up_proj.weight.grad is None
    with torch.enable_grad():
        assert not capture(model, ids(1, 4), [FIRST])[FIRST].requires_grad


def test_blocks_that_return_tuples():
    config = transformers.BloomConfig(vocab_size=256, hidden_size=32, n_layer=3, n_head=4)
    model, batch, outputs = transformers.BloomForCausalLM(config).eval(), ids(2, 6), []
    handle = model.transformer.h[2].register_forward_hook(lambda m, a, output: outputs.append(output))
    model(batch)
    handle.remove()
    assert isinstance(outputs[0], tuple)
    assert torch.equal(capture(model, batch, [HookPoint(2)])[HookPoint(2)], outputs[0][0])


def test_images_go_through_the_whole_wrapper():
    model = FAMILIES["qwen3_5"]()
    batch = torch.cat([ids(1, 3), torch.full((1, 4), 255), ids(1, 2, seed=1)], dim=1)
    model.config.image_token_id = model.model.config.image_token_id = 255
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    image = {
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (batch == 255).int(),
    }
    expected = plain_hooks(model, batch, **image)
    seen = capture(model, batch, POINTS, torch.ones_like(batch), **image)
    for point in POINTS:
        torch.testing.assert_close(seen[point], expected[point])
    text_only = capture(model, batch, [LAST])[LAST]
    assert not torch.allclose(seen[LAST], text_only, atol=1e-2)


def test_positions_count_tokens_not_padding():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 0]]


@pytest.mark.parametrize(
    ("batch", "points", "mask", "says"),
    [
        (torch.zeros(1, 3, dtype=torch.int64), [], None, "at least one hook point"),
        (torch.full((1, 3), 256), [FIRST], None, "token id 256 is outside the model's vocabulary of 256"),
        (torch.full((1, 3), -1), [FIRST], None, "token id -1 is outside"),
        (torch.zeros(1, 0, dtype=torch.int64), [FIRST], None, "neither empty"),
        (torch.zeros(3, dtype=torch.int64), [FIRST], None, None),
        (torch.zeros(1, 3, dtype=torch.int64), [FIRST], torch.ones(1, 4, dtype=torch.int64), None),
        (torch.zeros(2, 2, dtype=torch.int64), [FIRST], torch.tensor([[1, 1], [0, 0]]), "row 1 of the attention mask"),
    ],
)
def test_bad_input_is_refused(qwen3, batch, points, mask, says):
    # shapes that contradict each other are caught by the shape check that runs in tests, elsewhere by ours
    with pytest.raises((InputError, TypeCheckError) if says is None else InputError, match=says):
        capture(qwen3, batch, points, mask)


def test_a_layer_too_deep_names_the_layers_there_are(qwen3):
    with pytest.raises(NotFoundError, match="has 4 layers, 0 to 3"):
        capture(qwen3, ids(1, 2), [FIRST, HookPoint(4)])


def test_an_output_that_is_no_residual_is_refused():
    model = FAMILIES["qwen3"]()
    model.model.layers[1].register_forward_hook(lambda module, args, output: {"hidden": output})
    with pytest.raises(FormatError, match=r"block 1 \(Qwen3DecoderLayer\) gives a dict"):
        capture(model, ids(1, 2), [HookPoint(1)])


def test_virtual_tokens_of_an_adapter_are_refused():
    model = FAMILIES["qwen3"]()
    model.active_peft_config = type("PromptTuning", (), {"is_prompt_learning": True})()
    with pytest.raises(InputError, match="virtual tokens"):
        capture(model, ids(1, 2), [FIRST])

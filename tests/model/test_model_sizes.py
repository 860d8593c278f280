"""Sizes from the config alone, against the models themselves: their parameters, caches and live memory."""

import weakref

import pytest
import torch
import transformers
from families import CONFIGS, FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.model import HookPoint, blocks, capture, decoder, model_sizes

TEXT_ONLY = {"qwen3_5", "qwen3_5_moe"}  # wrappers whose text part is what gets loaded


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_those_of_the_model(family, name):
    model = family(f"{name}_text" if name in TEXT_ONLY else name)
    sizes = model_sizes(CONFIGS[name][1]())
    assert sizes.parameters == sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    assert sizes.blocks == tuple(sum(p.numel() for p in block.parameters()) for block in blocks(model))
    assert sizes.embedding == 256 * 32
    assert sizes.lm_head == (0 if model.config.get_text_config().tie_word_embeddings else 256 * 32)
    assert sizes.final == 32
    assert (sizes.other > 0) == (name == "gemma3")
    assert sizes.parameters_up_to(1) == 256 * 32 + sum(sizes.blocks[:2])
    assert sizes.weight_bytes("bfloat16") == 2 * sizes.parameters
    assert sizes.weight_bytes("float32", up_to=0) == 4 * sizes.parameters_up_to(0)


def tensors_of(cache):
    for layer in cache.layers:
        for value in vars(layer).values():
            for leaf in tree_leaves(value):
                if isinstance(leaf, torch.Tensor) and leaf.ndim > 1:
                    yield leaf


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in TEXT_ONLY])
def test_the_cache_is_that_of_a_forward_pass(family, name):
    batch, seq = 3, 21
    ids = torch.zeros(batch, seq, dtype=torch.int64)
    cache = decoder(family(name))(input_ids=ids, use_cache=True).past_key_values
    kept = sum(t.numel() * t.element_size() for t in tensors_of(cache))
    sizes = model_sizes(CONFIGS[name][1]())
    # a sliding window's cache drops the token that leaves the window next
    spare = batch * sum(4 * per for per, window in zip(sizes.cache, sizes.windows, strict=True) if window)
    assert kept == sizes.cache_bytes(batch, seq, "float32") - spare
    assert any(sizes.windows) == name.startswith("gemma")


@pytest.mark.parametrize(
    ("cls", "config", "parameters"),
    [  # as the released files count them
        (
            "Qwen3Config",
            {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
            | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
            8_190_735_360,
        ),
        (
            "Qwen3MoeConfig",
            {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
            | {"head_dim": 128, "vocab_size": 151936, "num_experts": 128, "moe_intermediate_size": 768},
            30_532_122_624,
        ),
    ],
)
def test_released_models(cls, config, parameters):
    sizes = model_sizes(getattr(transformers, cls)(**config, dtype="bfloat16"))
    assert sizes.parameters == parameters
    assert sizes.dtype == "bfloat16"
    assert sizes.weight_bytes() == 2 * parameters


class LiveBytes(TorchDispatchMode):
    """The largest sum of storages alive at once, of those made while it is on."""

    def __init__(self, model):
        super().__init__()
        self.known = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
        self.live = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in self.known:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


WIDE = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 96}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("cls", "config"),
    [
        ("Qwen3ForCausalLM", WIDE),
        ("Qwen3MoeForCausalLM", WIDE | EXPERTS),
        ("Qwen3_5ForCausalLM", WIDE | HYBRID),
        ("Qwen3_5MoeForCausalLM", WIDE | HYBRID | EXPERTS | {"shared_expert_intermediate_size": 96}),
        ("Gemma2ForCausalLM", WIDE | {"query_pre_attn_scalar": 64}),
    ],
)
def test_what_a_capture_needs_beside_the_weights(cls, config, dtype):
    """An estimate, held within a fifth of the live bytes on the CPU."""
    model_class = getattr(transformers, cls)
    config = model_class.config_class(**config)
    model = model_class(config).eval().to(getattr(torch, dtype))
    ids, points = torch.zeros(2, 256, dtype=torch.int64), [HookPoint(0), HookPoint(1)]
    with LiveBytes(model) as memory:
        capture(model, ids, points)
    assert model_sizes(config).capture_bytes(2, 256, len(points), dtype) == pytest.approx(memory.peak, rel=0.2)


def test_what_does_not_fit_is_refused():
    sizes = model_sizes(CONFIGS["qwen3"][1]())
    with pytest.raises(NotFoundError, match="layer 4 does not exist: the model has 4 layers, 0 to 3"):
        sizes.parameters_up_to(4)
    with pytest.raises(InputError, match="dtype is one of float32, bfloat16, float16, not 'int3'"):
        sizes.weight_bytes("int3")
    with pytest.raises(InputError, match="'t5', which is not a decoder language model"):
        model_sizes(transformers.T5Config())

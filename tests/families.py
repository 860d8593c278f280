"""Tiny random models of every supported family, built offline from their configs.

`FAMILIES` maps a name to a function that builds a fresh model in eval mode: vocabulary 256, d_model 32, four layers
(hybrid families mix their layer types), context 128. The seed is fixed, so two calls give equal weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB, D_MODEL, N_LAYERS, CONTEXT = 256, 32, 4, 128

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,  # the usual 0.02 leaves so small a model almost the identity
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 16}
_SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
}
_VISION = {
    "depth": N_LAYERS,  # as many blocks as the decoder: the blocks must not be found by their number alone
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": D_MODEL,
    "num_position_embeddings": 16,
}
_SIGLIP = {
    "hidden_size": D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def _qwen3() -> PreTrainedConfig:
    return transformers.Qwen3Config(**_DECODER)


def _qwen3_moe() -> PreTrainedConfig:
    return transformers.Qwen3MoeConfig(**_DECODER, **_EXPERTS, mlp_only_layers=[1])


def _qwen3_5_text() -> PreTrainedConfig:
    return transformers.Qwen3_5TextConfig(**_DECODER, **_HYBRID)


def _qwen3_5() -> PreTrainedConfig:
    return transformers.Qwen3_5Config(text_config=_qwen3_5_text().to_dict(), vision_config=_VISION)


def _qwen3_5_moe_text() -> PreTrainedConfig:
    return transformers.Qwen3_5MoeTextConfig(**_DECODER, **_HYBRID, **_EXPERTS, **_SHARED_EXPERT)


def _qwen3_5_moe() -> PreTrainedConfig:
    return transformers.Qwen3_5MoeConfig(text_config=_qwen3_5_moe_text().to_dict(), vision_config=_VISION)


def _qwen3_next() -> PreTrainedConfig:
    return transformers.Qwen3NextConfig(**_DECODER, **_HYBRID, **_EXPERTS, **_SHARED_EXPERT)


def _llama() -> PreTrainedConfig:
    return transformers.LlamaConfig(**_DECODER)


def _gemma2() -> PreTrainedConfig:
    return transformers.Gemma2Config(**_DECODER, **_SLIDING)


def _gemma3_text() -> PreTrainedConfig:
    return transformers.Gemma3TextConfig(**_DECODER, **_SLIDING)


def _gemma3() -> PreTrainedConfig:
    return transformers.Gemma3Config(
        text_config=_gemma3_text().to_dict(), vision_config=_SIGLIP, mm_tokens_per_image=4, image_token_index=VOCAB - 1
    )


CONFIGS: dict[str, tuple[str, Callable[[], PreTrainedConfig]]] = {
    "qwen3": ("Qwen3ForCausalLM", _qwen3),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _qwen3_moe),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", _qwen3_5_text),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", _qwen3_5),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", _qwen3_5_moe_text),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", _qwen3_5_moe),
    "qwen3_next": ("Qwen3NextForCausalLM", _qwen3_next),
    "llama": ("LlamaForCausalLM", _llama),
    "gemma2": ("Gemma2ForCausalLM", _gemma2),
    "gemma3_text": ("Gemma3ForCausalLM", _gemma3_text),
    "gemma3": ("Gemma3ForConditionalGeneration", _gemma3),
}
"""The class and the config of each family, for tests that need no weights."""


def build(name: str) -> PreTrainedModel:
    """A fresh tiny model of one family, float32 on the CPU, in eval mode."""
    cls, config = CONFIGS[name]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, cls)(config()).eval()


def _builder(name: str) -> Callable[[], PreTrainedModel]:
    return lambda: build(name)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {name: _builder(name) for name in CONFIGS}

"""The lab's language models: one tiny member of each Qwen family that Qwen-Scope covers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from qwen_scope.errors import NotFoundError, nearest

HEAD_DIM, HEADS, KV_HEADS = 32, 4, 2


def dense(d_model: int, n_layers: int, **common: Any) -> PretrainedConfig:
    """Qwen3: attention and a gated MLP in every block."""
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=d_model,
        intermediate_size=3 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        **common,
    )


def moe(d_model: int, n_layers: int, **common: Any) -> PretrainedConfig:
    """Qwen3-MoE: eight small experts per block, two of them for each token."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        hidden_size=d_model,
        intermediate_size=3 * d_model,
        moe_intermediate_size=d_model,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=n_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        **common,
    )


def hybrid(d_model: int, n_layers: int, **common: Any) -> PretrainedConfig:
    """Qwen3.5: gated linear attention, with full attention in every fourth block."""
    from transformers import Qwen3_5TextConfig

    return Qwen3_5TextConfig(
        hidden_size=d_model,
        intermediate_size=3 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        linear_key_head_dim=HEAD_DIM,
        linear_value_head_dim=HEAD_DIM,
        linear_num_key_heads=2,
        linear_num_value_heads=HEADS,
        **common,
    )


FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {"dense": dense, "moe": moe, "hybrid": hybrid}


def make_model(
    family: str,
    vocab_size: int,
    d_model: int,
    n_layers: int,
    context: int,
    eos_token_id: int,
    pad_token_id: int,
    seed: int = 0,
) -> PreTrainedModel:
    """A model with random weights, embeddings tied as in Qwen's small ones.

    Raises:
        NotFoundError: `family` is not one of `FAMILIES`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if family not in FAMILIES:
        raise NotFoundError(f"no family {family!r}: {nearest(family, FAMILIES)}")
    config = FAMILIES[family](
        d_model,
        n_layers,
        head_dim=HEAD_DIM,
        vocab_size=vocab_size,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)

"""How large a model is, from its config alone: weights counted on the meta device, cache and activations by shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.model import families
from qwen_scope.model.load import auto_class

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

PASS_TOKENS = 2048
"""Tokens of copies of a prompt that one pass without gradients takes."""
GRAPH_TOKENS = 512
"""Tokens of copies of a prompt that one pass with gradients takes."""
KEPT_BLOCKS = 2**14
"""Tokens times blocks whose activations one pass keeps for its gradient; beyond, blocks are computed again."""


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of one model, in parameters and in elements per token; methods turn them into bytes.

    Attributes:
        d_model: the width of the residual stream.
        dtype: the type its weights are stored in, as its config says; float32 where it says nothing.
        embedding: parameters of the token embedding.
        blocks: parameters of each decoder block.
        final: parameters of what else the decoder has, such as the final norm.
        lm_head: parameters of the LM head; 0 where it is tied to the embedding.
        other: parameters outside the text decoder, such as a vision tower.
        cache: per block the elements that the KV cache keeps for each token.
        windows: per block how many tokens that cache keeps at most, or None for all.
        states: per block the elements of a linear attention's state, whatever the length, as (in the model's dtype, in
            float32).
        activations: elements per token that a block holds at its widest point, as (in the model's dtype, in float32);
            the larger of several such points counts. An estimate of transformers' plain PyTorch path.
        throughout: of these, elements that a block holds at every point, such as the residual.
        score_heads: heads whose attention scores are written out, which no fused attention avoids; usually 0.
    """

    d_model: int
    dtype: str
    embedding: int
    blocks: tuple[int, ...]
    final: int
    lm_head: int
    other: int
    cache: tuple[int, ...]
    windows: tuple[int | None, ...]
    states: tuple[tuple[int, int], ...]
    activations: tuple[tuple[int, int], ...]
    throughout: int
    score_heads: int

    @property
    def parameters(self) -> int:
        """All parameters; tied ones count once."""
        return self.embedding + sum(self.blocks) + self.final + self.lm_head + self.other

    def parameters_up_to(self, layer: int) -> int:
        """The parameters a forward pass uses that stops after the block of `layer`: embedding and blocks 0 to `layer`.

        Raises:
            NotFoundError: the model has no such layer.
        """
        n = len(self.blocks)
        if not 0 <= layer < n:
            raise NotFoundError(f"layer {layer} does not exist: the model has {n} layers, 0 to {n - 1}")
        return self.embedding + sum(self.blocks[: layer + 1])

    def weight_bytes(self, dtype: str | None = None, up_to: int | None = None) -> int:
        """Bytes of the weights in `dtype` (None: as stored), all of them or those up to the block of a layer."""
        parameters = self.parameters if up_to is None else self.parameters_up_to(up_to)
        return parameters * self._itemsize(dtype)

    def cache_bytes(self, batch: int, seq: int, dtype: str | None = None) -> int:
        """Bytes of the KV cache and linear-attention states after `seq` tokens of `batch` sequences."""
        size = self._itemsize(dtype)
        total = 0
        for per_token, window, (state, state32) in zip(self.cache, self.windows, self.states, strict=True):
            kept = seq if window is None else min(seq, window)
            total += per_token * kept * size + state * size + state32 * BYTES["float32"]
        return batch * total

    def capture_bytes(self, batch: int, seq: int, n_hook_points: int, dtype: str | None = None) -> int:
        """Bytes that `capture` needs beside the weights: the captured residuals and one block at work, an estimate."""
        size = self._itemsize(dtype)
        working = max(wide * size + wide32 * BYTES["float32"] for wide, wide32 in self.activations)
        scores = 3 * self.d_model * size + 3 * self.score_heads * seq * BYTES["float32"]
        return batch * seq * (n_hook_points * self.d_model * size + max(working, scores))

    def block_graph_bytes(self, dtype: str | None = None) -> int:
        """Bytes per token that a block keeps for a gradient: what is computed at each of its wide points, an estimate.

        The residual and what else is there throughout is kept once, not with every point.
        """
        size = self._itemsize(dtype)
        computed = [(wide - self.throughout, wide32) for wide, wide32 in self.activations]
        return sum(wide * size + wide32 * BYTES["float32"] for wide, wide32 in computed)

    def _itemsize(self, dtype: str | None) -> int:
        name = self.dtype if dtype in (None, "auto") else dtype
        if name not in BYTES:
            raise InputError(f"dtype is one of {', '.join(BYTES)}, not {name!r}")
        return BYTES[name]


def model_sizes(config: PreTrainedConfig) -> ModelSizes:
    """Sizes of the model that `load_model` would load for this config, without its weights.

    Counted on a model built on the meta device, so mixtures of experts, hybrids and tied weights come out right. The
    cache assumes keys and values as they are; families that compress them need less.

    Raises:
        InputError: the architecture is not a decoder language model.
        NotFoundError: its blocks were not found.
    """
    with torch.device("meta"):
        model = auto_class(config.model_type).from_config(config)
    text = families.text_config(model)
    kinds = _layer_types(text)
    limits = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    return ModelSizes(
        d_model=text.hidden_size,
        dtype=str(getattr(config, "dtype", None) or getattr(text, "dtype", None) or "float32").removeprefix("torch."),
        cache=tuple(0 if kind == "linear_attention" else 2 * _kv_heads(text) * _head_dim(text) for kind in kinds),
        windows=tuple(_of(text, limits[kind]) if kind in limits else None for kind in kinds),
        states=tuple(_state(text) if kind == "linear_attention" else (0, 0) for kind in kinds),
        activations=_widest(text, kinds),
        throughout=_throughout(text),
        score_heads=text.num_attention_heads if getattr(text, "attn_logit_softcapping", None) else 0,
        **_count(model),
    )


def _count(model: PreTrainedModel) -> dict:
    """Parameters by part of the model."""
    blocks = families.blocks(model)
    inside = {id(p) for p in families.decoder(model).parameters()}
    in_block = [{id(p): p.numel() for p in block.parameters()} for block in blocks]
    block_of = {p for block in in_block for p in block}
    embedding = {id(p): p.numel() for p in model.get_input_embeddings().parameters()}
    head = model.get_output_embeddings()
    lm_head = {id(p): p.numel() for p in head.parameters() if id(p) not in embedding} if head is not None else {}
    rest = [p for p in model.parameters() if id(p) not in block_of | set(embedding) | set(lm_head)]
    return {
        "embedding": sum(embedding.values()),
        "blocks": tuple(sum(block.values()) for block in in_block),
        "final": sum(p.numel() for p in rest if id(p) in inside),
        "lm_head": sum(lm_head.values()),
        "other": sum(p.numel() for p in rest if id(p) not in inside),
    }


def _layer_types(text: PreTrainedConfig) -> list[str]:
    """What mixes tokens in each block."""
    if kinds := getattr(text, "layer_types", None):
        return list(kinds)
    kind = "sliding_attention" if _of(text, "sliding_window") and _of(text, "use_sliding_window") else "full_attention"
    return [kind] * text.num_hidden_layers


def _of(text: PreTrainedConfig, name: str, default: int = 0) -> int:
    return getattr(text, name, None) or default


def _kv_heads(text: PreTrainedConfig) -> int:
    return _of(text, "num_key_value_heads", text.num_attention_heads)


def _head_dim(text: PreTrainedConfig) -> int:
    return _of(text, "head_dim", text.hidden_size // text.num_attention_heads)


def _state(text: PreTrainedConfig) -> tuple[int, int]:
    """Elements a linear attention keeps of one sequence: its convolution's window, and its recurrent state."""
    keys = _of(text, "linear_num_key_heads") * _of(text, "linear_key_head_dim")
    values = _of(text, "linear_num_value_heads") * _of(text, "linear_value_head_dim")
    recurrent = values * _of(text, "linear_key_head_dim")
    return (2 * keys + values) * _of(text, "linear_conv_kernel_dim"), recurrent


def _throughout(text: PreTrainedConfig) -> int:
    """Elements per token alive throughout a block: embedding, residual and its normed copy, and the rotary angles."""
    return 3 * text.hidden_size + 2 * _head_dim(text)


def _widest(text: PreTrainedConfig, kinds: list[str]) -> tuple[tuple[int, int], ...]:
    """Elements per token alive at the wide points of a block, as (in the model's dtype, in float32).

    What is alive throughout, and then either three rows of the
    feed-forward layer's inner width; or for every chosen expert the rows gathered for it and given back; or queries,
    keys and values with their rotated and repeated copies; or the float32 working copies of a gated delta rule.
    """
    d, head, always = text.hidden_size, _head_dim(text), _throughout(text)
    heads, kv = text.num_attention_heads * head, _kv_heads(text) * head
    points = [(always + 3 * _of(text, "intermediate_size"), 0), (always + 5 * heads + 4 * kv, 0), (always, 3 * d)]
    if chosen := _of(text, "num_experts_per_tok"):
        expert = chosen * max(4 * d, 2 * d + 4 * _of(text, "moe_intermediate_size"))
        points.append((always + expert + _of(text, "shared_expert_intermediate_size"), 0))
    if "linear_attention" in kinds:
        value_heads = _of(text, "linear_num_value_heads")
        width = value_heads * max(_of(text, "linear_key_head_dim"), _of(text, "linear_value_head_dim"))
        points.append((always + 3 * width, 13 * width))
    return tuple(points)

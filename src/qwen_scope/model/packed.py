"""Weights in the blocks of a GGUF file, unpacked where they are used."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize

CHUNK = 2**26  # values of a weight that are unpacked at a time
Q5_0 = 6


class Packed(nn.Module):
    """A weight in blocks, `(rows, bytes per row)`; modules that share a weight share one of these.

    Args:
        kind: the number of the blocks' type in ggml.
        dtype: what values are unpacked to.
    """

    def __init__(self, blocks: Tensor, kind: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("blocks", blocks, persistent=False)
        self.blocks: Tensor
        self.kind, self.dtype = kind, dtype

    def forward(self, blocks: Tensor | None = None) -> Tensor:
        """Some rows of the weight, or all, unpacked at each call."""
        return unpacked(self.blocks if blocks is None else blocks, self.kind).to(self.dtype)


class PackedLinear(nn.Module):
    """A linear layer whose weight `(out_features, in_features)` stays packed and is unpacked when it runs."""

    def __init__(self, linear: nn.Module, packed: Packed) -> None:
        super().__init__()
        weight: Any = linear.weight
        self.out_features, self.in_features = weight.shape
        self.packed, self.bias = packed, getattr(linear, "bias", None)

    @property
    def weight(self) -> Tensor:
        """The whole weight, unpacked at each call."""
        return self.packed()

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + bias`, unpacking as many rows at a time as keep within `CHUNK` values."""
        rows = max(1, CHUNK // self.in_features)
        biases = repeat(None) if self.bias is None else self.bias.split(rows)
        parts = [
            nn.functional.linear(x, self.packed(some).to(x.dtype), bias)
            for some, bias in zip(self.packed.blocks.split(rows), biases, strict=False)
        ]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


class PackedEmbedding(nn.Module):
    """A token embedding whose weight `(num_embeddings, embedding_dim)` stays packed; rows looked up are unpacked."""

    def __init__(self, embedding: nn.Module, packed: Packed) -> None:
        super().__init__()
        weight: Any = embedding.weight
        self.num_embeddings, self.embedding_dim = weight.shape
        self.packed, self.scale = packed, float(getattr(embedding, "embed_scale", 1.0))

    @property
    def weight(self) -> Tensor:
        """The whole weight, unpacked at each call."""
        return self.packed()

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of some tokens, `(*ids.shape, embedding_dim)`, with the factor that some models put on them."""
        rows = self.packed(self.packed.blocks[ids.flatten()]).reshape(*ids.shape, -1)
        return rows if self.scale == 1 else rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)


def packed_kind(module: nn.Module) -> type[PackedLinear] | type[PackedEmbedding] | None:
    """What holds a packed weight in the place of a module, or None where the module computes something else."""
    if type(module) is nn.Linear:
        return PackedLinear
    scaled = isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding")
    return PackedEmbedding if scaled or type(module) is nn.Embedding else None


def unpacked(rows: Tensor, kind: int) -> Tensor:
    """Rows as they lie in a file, `(..., bytes per row)`, to fp32 values `(..., values per row)`.

    PyTorch unpacks the usual kinds where the rows are; NumPy unpacks the others on the CPU.
    """
    if kind in GGML_BLOCK:
        return dequantize(rows, kind, torch.float32).reshape(*rows.shape[:-1], -1)
    if kind == Q5_0:
        return unpacked_q5_0(rows)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as by_numpy

    values = by_numpy(rows.cpu().numpy(), GGMLQuantizationType(kind))
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(rows.device)


def unpacked_q5_0(rows: Tensor) -> Tensor:
    """Blocks of 32 values in 22 bytes: a scale in fp16, a fifth bit of each value, and four bits of each, those of the
    second half above those of the first; a value is `scale * (bits - 16)`.
    """
    blocks = rows.reshape(-1, 22)
    scale, high, low = blocks[:, :2].view(torch.float16).float(), blocks[:, 2:6], blocks[:, 6:]
    fifth = (high[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=rows.device) & 1).reshape(-1, 32)
    bits = torch.cat([low & 15, low >> 4], -1) | fifth << 4
    return (scale * (bits.to(torch.int8) - 16).float()).reshape(*rows.shape[:-1], -1)


def tie(model: PreTrainedModel) -> None:
    """Give the LM head the embedding's weight where the config ties them, packed or not."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, PackedEmbedding):
        model.tie_weights()
    elif head is not None and not isinstance(head, PackedLinear) and head.weight.is_meta:
        model.set_output_embeddings(PackedLinear(head, embedding.packed))

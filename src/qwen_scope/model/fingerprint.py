"""Which weights a language model has: one digest, the same wherever they lie and in whichever type they were loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .families import text_config
from .packed import PackedEmbedding, PackedLinear

ROWS, COLUMNS = 16, 64
"""How much of a tensor is looked at: an ordinary fine-tune moves some of these in some tensor."""

# What changes a residual though all weights and their shapes stay; nothing whose spelling changes between versions.
SETTINGS = (
    "model_type", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
    "hidden_act", "hidden_activation", "activation_function", "sliding_window",
)  # fmt: skip
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SMALLEST = 2.0**-14  # below it float16 loses bits that bfloat16 keeps


def weights_fingerprint(model: nn.Module) -> str | None:
    """SHA-256 over a few settings, and the name, shape and 1,024 values of every tensor; None where it can't be read.

    A value counts as bfloat16 rounds it, and as 0 below 2^-14. So a checkpoint in bfloat16 has one fingerprint whether
    it is loaded as bfloat16, float16 or float32, and one in float32 the same as float32 and bfloat16. A GGUF has that
    of its unpacked weights, packed or not. An adapter that is merged, or that lies beside the weights, gives another
    fingerprint than its base, and so does a quantised weight: it is what is read that counts. RoPE counts by its
    frequencies.

    Weights that are not in memory (`device_map` with a disk) and tensors that can't be indexed have no fingerprint.
    """
    config = text_config(model)
    said = {name: plain(getattr(config, name, None)) for name in SETTINGS}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    try:
        for name, shape, sample in sorted(samples(model), key=lambda one: one[0]):
            digest.update(f"\0{name}\0{list(shape)}\0".encode())
            digest.update(canonical(sample()))
    except (RuntimeError, NotImplementedError, TypeError, IndexError):
        return None  # a tensor without values here, or of a kind of its own
    return digest.hexdigest()


def samples(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """Name, shape and sampled values of every tensor that the model computes with."""
    packed = {
        name: module for name, module in model.named_modules() if isinstance(module, PackedLinear | PackedEmbedding)
    }
    for name, module in packed.items():
        blocks = module.packed.blocks
        shape = tuple(int(n) for n in (
            (module.out_features, module.in_features)
            if isinstance(module, PackedLinear)
            else (module.num_embeddings, module.embedding_dim)
        ))  # fmt: skip

        def unpack(module: Any = module, blocks: Tensor = blocks, shape: tuple[int, ...] = shape) -> Tensor:
            rows, columns = places(shape)
            return module.packed(blocks[rows.to(blocks.device)])[:, columns.to(blocks.device)]

        yield f"{name}.weight", shape, unpack
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    tensors |= {name: value for name, value in model.named_buffers() if name.endswith("inv_freq")}
    for name, value in tensors.items():
        if f"{name.removesuffix('.weight')}" not in packed:
            yield name, tuple(value.shape), lambda value=value: taken(value)


def taken(value: Tensor) -> Tensor:
    """The sampled values of a tensor, wherever and however it lies; a matrix has its first dimension as rows."""
    if value.ndim < 2:
        return value.detach()[places((1, len(value) if value.ndim else 1))[1].to(value.device)] if value.ndim else value
    rows, columns = places((value.shape[0], math.prod(value.shape[1:])))
    index = torch.unravel_index(columns, value.shape[1:])
    return value.detach()[(rows[:, None].to(value.device), *(part[None].to(value.device) for part in index))]


def places(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """At most `ROWS` rows and `COLUMNS` columns of a matrix, or `ROWS * COLUMNS` places of a vector, evenly spread."""
    rows, columns = shape
    most = ROWS * COLUMNS if rows == 1 else COLUMNS
    return spread(rows, ROWS), spread(columns, most)


def spread(n: int, most: int) -> Tensor:
    """Up to `most` different numbers from 0 to `n - 1`, the first and the last among them."""
    if n <= most:
        return torch.arange(n)
    return torch.arange(most, dtype=torch.int64) * (n - 1) // (most - 1)


def canonical(values: Tensor) -> bytes:
    """Values as bytes that don't depend on the type in which floats are held; other types as they are."""
    if values.is_meta:
        raise NotImplementedError("a tensor without values")
    if values.dtype in FLOATS:
        rounded = values.to(torch.bfloat16).float()
        rounded = torch.where(rounded.abs() < SMALLEST, 0.0, rounded)  # also -0
        return rounded.cpu().contiguous().numpy().tobytes()
    return values.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def plain(value: Any) -> str:
    """A setting as text; a float to six digits, since files round it in different types."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)

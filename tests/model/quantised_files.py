"""Checkpoints in the layouts of quantised models, written from their published formulas one number at a time, beside
the weights that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from byte_tokenizer import byte_tokenizer
from safetensors.torch import save_file
from torch import Tensor

# No multiple of 128, so that blocks are cut; multiples of 32, so that groups are not.
WIDTH, INNER, HEAD = 160, 224, 32
Parts = dict[str, Tensor]


def model(width: int = WIDTH, inner: int = INNER) -> Any:
    """A small random Qwen3 in fp32."""
    config = transformers.AutoConfig.for_model(
        "qwen3", hidden_size=width, intermediate_size=inner, num_attention_heads=2, num_key_value_heads=1,
        head_dim=HEAD, num_hidden_layers=2, vocab_size=288, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, one in made.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(one, 1.0, 0.1)
    return made.eval().requires_grad_(False)


def stream(codes: Any, bits: int) -> list[int]:
    """Codes one after the other from the lowest bit on, as words of 32 bits."""
    whole = sum(int(code) << bits * place for place, code in enumerate(codes))
    words = -(-len(codes) * bits // 32)
    return [int.from_bytes(whole.to_bytes(4 * words, "little")[4 * i : 4 * i + 4], "little") for i in range(words)]


def words(rows: Any, bits: int) -> Tensor:
    """Rows of codes as rows of words, int32."""
    return torch.from_numpy(np.array([stream(row, bits) for row in rows], np.uint32).view(np.int32))


def levels(weight: Tensor, bits: int, size: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `(rows, columns)`, zeros and scales `(rows, groups)` of rounding to the nearest level in each group."""
    groups, top = weight.double().numpy().reshape(len(weight), -1, size), 2**bits - 1
    if symmetric:
        scale = np.abs(groups).max(-1) / (2 ** (bits - 1) - 1)
        zero = np.full_like(scale, 2 ** (bits - 1))
    else:
        scale = (groups.max(-1) - groups.min(-1)) / top
        zero = np.clip(np.round(-groups.min(-1) / scale), 1, top)
    scale = scale.astype(np.float16).astype(np.float64)
    codes = np.clip(np.round(groups / scale[..., None]) + zero[..., None], 0, top)
    return codes.reshape(weight.shape).astype(int), zero.astype(int), scale


def meant(codes: np.ndarray, zero: np.ndarray, scale: np.ndarray) -> Tensor:
    """`(code - zero) * scale` of each group."""
    groups = codes.reshape(len(codes), scale.shape[1], -1)
    return torch.from_numpy(((groups - zero[..., None]) * scale[..., None]).reshape(codes.shape))


def half(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).half()


def gptq(
    bits: int, symmetric: bool, version: int = 1, shuffled: bool = False
) -> Callable[[Tensor], tuple[Parts, Tensor]]:
    def write(weight: Tensor) -> tuple[Parts, Tensor]:
        columns = weight.shape[1]
        order = np.random.default_rng(1).permutation(columns) if shuffled else np.arange(columns)
        codes, zero, scale = levels(weight[:, order], bits, 32, symmetric)
        back = np.argsort(order)
        parts = {
            "qweight": words(codes[:, back], bits).T, "qzeros": words((zero - (version == 1)).T, bits),
            "scales": half(scale.T), "g_idx": torch.from_numpy(back // 32).int(),
        }  # fmt: skip
        return parts, meant(codes, zero, scale)[:, back]

    return write


def awq(weight: Tensor) -> tuple[Parts, Tensor]:
    codes, zero, scale = levels(weight, 4, 32, False)

    def laid(table: np.ndarray) -> Tensor:  # AutoAWQ's order of eight columns in a word
        eights = table.reshape(len(table), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return words(eights.reshape(table.shape), 4)

    return {"qweight": laid(codes.T), "qzeros": laid(zero.T), "scales": half(scale.T)}, meant(codes, zero, scale)


def packed(bits: int, symmetric: bool) -> Callable[[Tensor], tuple[Parts, Tensor]]:
    def write(weight: Tensor) -> tuple[Parts, Tensor]:
        codes, zero, scale = levels(weight, bits, 32, symmetric)
        parts = {
            "weight_packed": words(codes, bits), "weight_scale": half(scale),
            "weight_shape": torch.tensor(weight.shape),
        }  # fmt: skip
        if not symmetric:
            parts["weight_zero_point"] = words(zero.T, bits).T
        return parts, meant(codes, zero, scale)

    return write


def int8(weight: Tensor) -> tuple[Parts, Tensor]:
    codes, zero, scale = levels(weight, 8, weight.shape[1], True)
    codes = codes - zero
    return {"weight": torch.from_numpy(codes).to(torch.int8), "weight_scale": half(scale)}, torch.from_numpy(
        codes * scale
    )


def int8_zeros(weight: Tensor) -> tuple[Parts, Tensor]:
    codes, zero, scale = levels(weight, 8, weight.shape[1], False)
    whole = {"weight": codes - 128, "weight_zero_point": zero - 128}
    parts = {name: torch.from_numpy(one).to(torch.int8) for name, one in whole.items()}
    return {**parts, "weight_scale": half(scale)}, meant(codes, zero, scale)


def fp8(rows: int, columns: int, name: str, exponents: bool = False) -> Callable[[Tensor], tuple[Parts, Tensor]]:
    """One scale for each block, by which the stored numbers are multiplied; 0 for the whole side."""

    def write(weight: Tensor) -> tuple[Parts, Tensor]:
        high, wide = rows or len(weight), columns or weight.shape[1]
        grid = (-(-len(weight) // high), -(-weight.shape[1] // wide))
        scale, stored = torch.empty(grid), torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        dense = torch.empty_like(weight, dtype=torch.float64)
        for i in range(grid[0]):
            for j in range(grid[1]):
                block = (slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
                factor = weight[block].abs().max() / 448
                scale[i, j] = torch.exp2(factor.log2().ceil()) if exponents else factor.bfloat16().float()
                stored[block] = (weight[block] / scale[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
                dense[block] = stored[block].double() * scale[i, j].double()
        kept = (scale.log2() + 127).to(torch.uint8) if exponents else scale.bfloat16()
        return {"weight": stored, name: kept if rows or columns else kept.reshape(())}, dense

    return write


def mlx(bits: int, size: int = 32) -> Callable[[Tensor], tuple[Parts, Tensor]]:
    def write(weight: Tensor) -> tuple[Parts, Tensor]:
        groups = weight.double().numpy().reshape(len(weight), -1, size)
        scale = ((groups.max(-1) - groups.min(-1)) / (2**bits - 1)).astype(np.float16).astype(np.float64)
        bias = groups.min(-1).astype(np.float16).astype(np.float64)
        codes = np.clip(np.round((groups - bias[..., None]) / scale[..., None]), 0, 2**bits - 1).astype(int)
        dense = torch.from_numpy((codes * scale[..., None] + bias[..., None]).reshape(weight.shape))
        kept = words(codes.reshape(weight.shape), bits).view(torch.uint32)
        return {"weight": kept, "scales": half(scale), "biases": half(bias)}, dense

    return write


def written(
    folder: Path,
    made: Any,
    write: Callable[[Tensor], tuple[Parts, Tensor]],
    said: dict[str, Any],
    *,
    only: str = "_proj",
) -> Any:
    """The folder; the model gets the weights that the file stands for."""
    made.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for name, one in made.named_parameters():
        if one.dim() == 2 and only in name:
            parts, dense = write(one)
            tensors |= {name.removesuffix("weight") + end: part.contiguous() for end, part in parts.items()}
            one.copy_(dense)
        else:
            tensors[name] = one.clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    say(folder, **said)
    return made


def say(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))

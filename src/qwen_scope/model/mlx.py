"""Tensors of MLX's checkpoints by the names and in the forms of transformers.

mlx-lm changes some weights when it converts a model (the `sanitize` of its model files, 0.32): experts are stacked,
convolutions have their channels last, and norms that multiply by `1 + weight` hold that sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qwen_scope.errors import FormatError, InputError

from .checkpoint import Lazy
from .quantized import INSTEAD

# Architectures whose conversion was read: those whose weights keep names and values, experts aside, and those whose
# norms and convolutions change, too.
KEPT = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "smollm3")
CHANGED = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")

NORMS = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "model.norm.weight",
    "q_norm.weight",
    "k_norm.weight",
)
INNER = "language_model."
STACKED = ".switch_mlp.gate_proj.weight"


def named(name: str, architecture: str, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The tensors as transformers would have saved them.

    Args:
        name: what messages call the model.   architecture: its `model_type`.

    Raises:
        InputError: an architecture whose conversion was not read.
    """
    if architecture not in (*KEPT, *CHANGED):
        raise InputError(
            f"{name!r} was converted for MLX, which is read for {', '.join((*KEPT, *CHANGED))}, not for"
            f" {architecture!r}; {INSTEAD}"
        )
    out: dict[str, Lazy] = {}
    for key, one in tensors.items():
        if architecture in CHANGED:
            one = _changed_back(key, one)
        if key.startswith(INNER):
            key = key.removeprefix(INNER).replace("model.", "model.language_model.", 1)
        out[key] = one
    for gate in [key for key in out if key.endswith(STACKED)]:
        stem = gate.removesuffix(STACKED)
        halves, down = (
            [out.pop(gate), out.pop(f"{stem}.switch_mlp.up_proj.weight", None)],
            f"{stem}.switch_mlp.down_proj.weight",
        )
        if None in halves or down not in out:
            raise FormatError(f"the weights of {name!r} lack experts beside {gate!r}")
        out[f"{stem}.experts.gate_up_proj"] = replace(
            halves[0], make=lambda halves=halves: torch.cat([one[...] for one in halves], 1)
        )
        out[f"{stem}.experts.down_proj"] = out.pop(down)
    return out


def _changed_back(key: str, one: Lazy) -> Lazy:
    change: Callable[[Tensor], Tensor] | None = None
    if key.endswith(NORMS):
        change = lambda weight: weight.float() - 1  # noqa: E731
    elif key.endswith("conv1d.weight"):
        change = lambda weight: weight.movedim(-1, 1)  # noqa: E731
    return one if change is None else replace(one, make=lambda: change(one.make()))

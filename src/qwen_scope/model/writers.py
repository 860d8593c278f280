"""The weights that write to the residual stream: embedding, and the last matrices of attention and MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qwen_scope.errors import InputError, NotFoundError

from .families import block_path, blocks, d_model, part_of
from .hookpoint import HookPoint

OUTPUTS = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo")
"""The names that families give the module, or the tensor of all experts, whose product a part of a block returns."""

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Writer:
    """One parameter whose product with something is added to the residual stream.

    Attributes:
        name: of the parameter in the model, such as `model.layers.3.mlp.down_proj.weight`.
        dim: which of its dimensions runs over the `d_model` numbers of the stream.
    """

    name: str
    dim: int


def part_writers(model: nn.Module, point: HookPoint) -> list[Writer]:
    """The parameters whose product the attention or the MLP of a block returns: weights and biases, all experts.

    Raises:
        NotFoundError: the block has no such part, or the part has no module of a known name that writes.
        InputError: weights that are quantised, offloaded, or of another shape than the stream's.
    """
    part = part_of(blocks(model)[point.layer], point.layer, point.stream)
    path = next(name for name, module in model.named_modules() if module is part)
    assert path.startswith(block_path(model, point.layer))
    found = []
    for name, module in part.named_modules(prefix=path):
        last = name.rpartition(".")[2]
        if last in OUTPUTS:
            found.append((f"{name}.weight", 1 if isinstance(module, Conv1D) else 0))
            found += [(f"{name}.bias", 0)] * (getattr(module, "bias", None) is not None)
        for own, _ in module.named_parameters(recurse=False):
            if own in OUTPUTS:  # of all experts at once
                found.append((f"{name}.{own}", 2 if getattr(module, "is_transposed", False) else 1))
            elif own.removesuffix("_bias") in OUTPUTS:
                found.append((f"{name}.{own}", 1))
    if not found:
        raise NotFoundError(
            f"the {type(part).__name__} at {point} has no output projection of a name that is known here:"
            f" {', '.join(OUTPUTS)}"
        )
    return [_checked(model, point, Writer(*one)) for one in found]


def embedding_writer(model: nn.Module) -> Writer:
    """The weight of the token embedding.

    Raises:
        InputError: it is quantised, offloaded, or of another width than the stream.
    """
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    path = next(name for name, module in model.named_modules() if module is embedding)
    return _checked(model, "the embedding", Writer(f"{path}.weight", 1))


def _checked(model: nn.Module, where: object, one: Writer) -> Writer:
    place, _, name = one.name.rpartition(".")
    weight: Any = getattr(model.get_submodule(place), name)
    what = None
    if not isinstance(weight, nn.Parameter):
        what = f"{one.name} is packed"
    elif weight.is_meta:
        what = f"{one.name} is offloaded"
    elif weight.dtype not in PLAIN or type(weight) is not nn.Parameter:
        what = f"{one.name} is of type {str(weight.dtype).removeprefix('torch.')}"
    if what is not None:
        raise InputError(
            f"the weights at {where} can't be changed ({what}): open the model in its original precision and on one"
            " device, a GGUF with dtype float32"
        )
    if weight.shape[one.dim] != d_model(model):
        raise InputError(
            f"{one.name} has the shape {tuple(weight.shape)}, which does not write to a stream of {d_model(model)}"
        )
    return one

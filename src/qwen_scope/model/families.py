"""Where a decoder keeps its parts, found by structure first.

The blocks are the outermost list of as many modules as the text config counts layers; where several lists fit (a
vision tower of equal depth), the one next to the token embedding. That rule finds the decoder inside a vision-language
wrapper, a bare `AutoModel`, a PEFT wrapper, a quantised model or one spread over devices. `FAMILIES` holds a row only
for a model type where the rule is not enough.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig

from qwen_scope.errors import FormatError, InputError, NotFoundError


@dataclass(frozen=True)
class Family:
    """Where one model type keeps its parts.

    Attributes:
        owner: the path of the module that holds the blocks, from the model that carries the config.
        blocks: the name of the list of blocks in it.
        final_norm: the name of the norm in it that follows the last block.
    """

    owner: str
    blocks: str
    final_norm: str


FAMILIES: dict[str, Family] = {
    # its cross-attention layers stand in a second list of the same length beside the blocks
    "idefics": Family(owner="model", blocks="layers", final_norm="norm"),
}
"""Rows by `model_type`, for the families whose structure alone does not tell."""

PARTS: dict[str, tuple[str, ...]] = {
    "mlp_out": ("mlp", "feed_forward", "block_sparse_moe", "ffn"),
    "attn_out": ("self_attn", "linear_attn", "self_attention", "attention", "attn"),
}
"""The names that families give the module of a block whose output is that stream."""


def text_config(model: nn.Module) -> PreTrainedConfig:
    """The config of the text decoder, also where a wrapper adds vision or audio.

    Raises:
        InputError: the model has no transformers config, or is an encoder-decoder.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise InputError(
            f"{type(model).__name__} carries no transformers config; pass the Hugging Face model itself,"
            " unwrapped from DistributedDataParallel or the like"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__} is an encoder-decoder; only decoders have one residual stream")
    return config.get_text_config(decoder=True)


def d_model(model: nn.Module) -> int:
    """The width of the residual stream."""
    return int(text_config(model).hidden_size)


def n_layers(model: nn.Module) -> int:
    """How many decoder blocks the model has; hook points run from layer 0 to one less."""
    return len(blocks(model))


def context_length(model: nn.Module) -> int | None:
    """The longest text in tokens that the config allows, or None where it sets no limit."""
    return getattr(text_config(model), "max_position_embeddings", None)


def decoder(model: nn.Module) -> nn.Module:
    """The module that runs embedding, blocks and final norm on token ids, without the LM head.

    Raises:
        NotFoundError: no list of blocks was found.
        FormatError: several lists of blocks fit equally well.
    """
    path = _locate(model)[0]
    embedding = _embedding(model)
    while path and embedding is not None and embedding not in set(model.get_submodule(path).modules()):
        path = path.rpartition(".")[0]  # some families keep the blocks one level below the embedding
    return model.get_submodule(path)


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks in order; block n writes the residual of layer n.

    Raises:
        NotFoundError: no list of blocks was found.
        FormatError: several lists of blocks fit equally well.
    """
    found = model.get_submodule(_join(*_locate(model)))
    assert isinstance(found, nn.ModuleList)
    return found


def block_path(model: nn.Module, layer: int) -> str:
    """The path of a block as `named_modules()` shows it, such as `model.language_model.layers.12`.

    Raises:
        NotFoundError: the model has no such layer.
    """
    check_layers(model, layer)
    return _join(*_locate(model), str(layer))


def part_of(block: nn.Module, layer: int, stream: str) -> nn.Module:
    """The module whose output is the stream: the block itself for `resid_post`, else its MLP or its attention.

    Raises:
        NotFoundError: the block has no such module, or several.
        InputError: the module adds the residual by itself, so its output is not its own contribution.
    """
    if stream == "resid_post":
        return block
    children = dict(block.named_children())
    found = [children[name] for name in PARTS[stream] if name in children]
    if len(found) != 1:
        raise NotFoundError(
            f"layer {layer} has no {stream}: its {type(block).__name__} holds {', '.join(children)}, and {stream} is"
            f" the output of one of {', '.join(PARTS[stream])}"
        )
    if "residual" in inspect.signature(found[0].forward).parameters:
        raise InputError(
            f"layer {layer} has no {stream}: its {type(found[0]).__name__} adds the residual by itself; read resid_post"
        )
    return found[0]


def norms_parts(model: nn.Module, layer: int) -> bool:
    """Whether the block norms what its MLP writes once more before adding it, as in Gemma 2 and 3."""
    return "post_feedforward_layernorm" in dict(blocks(model)[layer].named_children())


def check_layers(model: nn.Module, *layers: int) -> None:
    """Refuse layers the model does not have.

    Raises:
        NotFoundError: it says how many layers there are.
    """
    n = n_layers(model)
    for layer in layers:
        if not 0 <= layer < n:
            raise NotFoundError(f"layer {layer} does not exist: {type(model).__name__} has {n} layers, 0 to {n - 1}")


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the LM head.

    Raises:
        NotFoundError: the decoder has none.
    """
    owner = model.get_submodule(_locate(model)[0])
    if row := _row(model):
        return owner.get_submodule(row.final_norm)
    norms = [child for child in owner.children() if "norm" in type(child).__name__.lower()]
    if not norms:
        raise NotFoundError(f"{type(owner).__name__} has no norm beside its blocks")
    return norms[-1]


def unembedding(model: nn.Module) -> Float[Tensor, "vocab d_model"]:
    """The weight that turns a normed residual into logits; a bare decoder answers only if its embedding is tied.

    Raises:
        NotFoundError: the model has no LM head.
        InputError: the weight is kept off the device by an offloading `device_map`.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    if head is None and getattr(text_config(model), "tie_word_embeddings", False):
        head = _embedding(model)
    if head is None:
        raise NotFoundError(
            f"{type(model).__name__} has no LM head; load it with AutoModelForCausalLM to have an unembedding"
        )
    weight: Any = head.weight
    if weight.device.type == "meta":
        raise InputError("the LM head is offloaded; load the model with a device_map that keeps it on a device")
    return weight


def input_device(model: nn.Module) -> torch.device:
    """Where token ids have to be for the model to run; a model spread over devices starts at its embedding."""
    embedding = _embedding(model)
    place = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    if place is not None:
        return torch.device(place)
    holder = model if embedding is None else embedding
    return next(chain(holder.parameters(), holder.buffers())).device  # packed weights are buffers


def _locate(model: nn.Module) -> tuple[str, str]:
    """The path of the module that owns the blocks, and the name of the list in it."""
    config = text_config(model)
    if row := _row(model):
        return row.owner, row.blocks
    n = config.num_hidden_layers
    found = list(_lists(model, n))
    if len(found) > 1:
        embedding = _embedding(model)
        beside = [place for place in found if embedding in set(model.get_submodule(place[0]).children())]
        below = [place for place in found if embedding in set(model.get_submodule(place[0]).modules())]
        found = beside or below or found
    if not found:
        raise NotFoundError(
            f"{type(model).__name__} (model type {config.model_type!r}) has no list of {n} decoder blocks;"
            " add a row for it to qwen_scope.model.families.FAMILIES"
        )
    if len(found) > 1:
        names = ", ".join(_join(*place) for place in found)
        raise FormatError(
            f"{type(model).__name__} (model type {config.model_type!r}) has several lists of {n} blocks: {names};"
            " add a row for it to qwen_scope.model.families.FAMILIES"
        )
    return found[0]


def _row(model: nn.Module) -> Family | None:
    return FAMILIES.get(text_config(model).model_type)


def _lists(model: nn.Module, n: int) -> Iterator[tuple[str, str]]:
    """Every outermost list of `n` modules, as (path of its owner, its name); lists inside blocks are experts."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(outer) for outer in inside):
            continue
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == n:
                inside.append(_join(path, name) + ".")
                yield path, name


def _embedding(model: nn.Module) -> nn.Module | None:
    """The token embedding as transformers names it, or None where it can't tell."""
    try:
        return model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    except (NotImplementedError, AttributeError):
        return None


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)

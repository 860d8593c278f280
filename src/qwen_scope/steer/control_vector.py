"""Interventions as a control vector of llama.cpp: per block one vector that is added to its output at all tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qwen_scope.errors import InputError, check_count, need
from qwen_scope.files import write_whole

from .intervention import Intervention
from .steering import SAEsByLayer, StatsByLayer, resolve

SUFFIX = ".gguf"


def check_control_vector(interventions: Sequence[Intervention]) -> None:
    """Refuse what a control vector can't express; needs no model.

    Raises:
        InputError: the sentence names the first such intervention.
    """
    for one in interventions:
        if one.op != "add":
            why = "it only adds vectors; use add, or steer with this toolkit"
        elif one.hook_point.stream != "resid_post":
            why = "it is added to the outputs of blocks; use resid_post"
        elif one.layer == 0:
            why = "llama.cpp adds none to the output of block 0; use layer 1 or a later one"
        elif not one.where.everywhere:
            why = f"it is added at all tokens, not at {str(one.where)!r}; use where 'all'"
        else:
            continue
        raise InputError(f"a control vector can't express the {spoken(one)}: {why}")


def control_vector(
    model: nn.Module,
    interventions: Sequence[Intervention],
    saes: SAEsByLayer | None = None,
    stats: StatsByLayer | None = None,
) -> dict[int, Float[Tensor, " d_model"]]:
    """By layer, what the interventions add to the output of its block, in fp32 on the CPU.

    Raises:
        InputError: what `check_control_vector` refuses, or nothing is added; else as `steering`.
        NotFoundError, MismatchError: as `steering`.
    """
    check_control_vector(interventions)
    found: dict[int, Tensor] = {}
    for one in resolve(model, interventions, saes, stats):
        vector = one.amount * one.vector(None if saes is None or one.feature is None else saes[one.layer]).cpu()
        found[one.layer] = found.get(one.layer, torch.zeros_like(vector)) + vector
    found = {layer: found[layer] for layer in sorted(found) if bool(found[layer].any())}
    if not found:
        raise InputError("the interventions add nothing, so there is no control vector to write")
    return found


def write_control_vector(
    vectors: Mapping[int, Float[Tensor, " d_model"]], path: str | os.PathLike[str], model_type: str = ""
) -> None:
    """Write vectors as llama.cpp's `--control-vector` takes them.

    A GGUF file whose tensors `direction.N`, each one-dimensional and float32, are added to the output of block N, which
    is our layer N: llama.cpp's loader counts the vectors from 1, and gives block N the one at N (`common.cpp`,
    `llama-adapter.cpp`).

    Args:
        vectors: by layer, from 1.
        model_type: of the config, which llama.cpp shows and does not check.

    Raises:
        InputError: layer 0, no vector, or a file that can't be written.
        NotFoundError: the package gguf is missing.
    """
    need("writing a control vector", "gguf")
    from gguf import GGUFWriter

    if not vectors:
        raise InputError("a control vector needs at least one layer")
    for layer in vectors:
        check_count("a layer of a control vector", layer, 1)
    with write_whole(path) as part:
        writer = GGUFWriter(part, "controlvector")
        writer.add_string("controlvector.model_hint", model_type)
        writer.add_uint32("controlvector.layer_count", len(vectors))
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", vector.float().cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def spoken(one: Intervention) -> str:
    """An intervention in a few words."""
    what = f"feature {one.layer}/{one.feature}" if one.feature is not None else "a direction"
    return f"{one.op} of {what} at {one.hook_point}"

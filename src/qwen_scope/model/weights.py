"""The weights of a checkpoint as a model of transformers, each tensor used or refused."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from qwen_scope.errors import FormatError, NotFoundError, foreign

from .checkpoint import Lazy, read_checkpoint
from .dense import dense, plain_type, refuse_packed, refuse_plain, refuse_scales
from .place import sentence
from .quantized import INSTEAD, Quantised


def load_weights(
    name: str, place: str, auto: Any, config: PreTrainedConfig, stored: Quantised | None, options: dict[str, Any]
) -> PreTrainedModel:
    """The model of a folder or a repository.

    Args:
        name: what messages call it.   place: the folder or the repository.   auto: the auto class that builds it.
        stored: how its weights are quantised, if they are.
        options: of `from_pretrained`: revision, dtype, and where the weights go.

    Raises:
        NotFoundError: files of weights are missing.
        FormatError: a file that can't be read, or tensors that are missing, left over or of other shapes.
    """
    tensors = read_checkpoint(name, place, options["revision"])
    options = {"config": config, "use_safetensors": True, **options}
    source: str | None = place
    of: Any = auto
    if stored is None:
        refuse_packed(name, tensors)
    elif tensors:
        refuse_plain(name, stored, tensors)
        if stored.unpacked:
            of, given = _unpacked(name, auto, config, stored, tensors, options["dtype"])
            source, options = None, options | given
    hint = "" if stored is None else f"its weights are quantised ({stored}); {INSTEAD}"
    with foreign(f"the weights of {name!r} can't be loaded", hint=hint):
        try:  # what does not fit is reported below in one sentence, not raised with a table
            model, info = of.from_pretrained(source, ignore_mismatched_sizes=True, output_loading_info=True, **options)
        except OSError as error:
            raise NotFoundError(f"the weights of {name!r} can't be loaded: {sentence(error)}") from error
    if mismatched := sorted(info["mismatched_keys"]):
        raise FormatError(
            f"the weights of {name!r} do not have the shapes its config.json says, such as {mismatched[0][0]!r}"
        )
    if missing := sorted(info["missing_keys"]):
        raise FormatError(f"the weights of {name!r} lack {len(missing)} tensors, such as {missing[0]!r}")
    refuse_scales(name, info["unexpected_keys"])
    if source is None:
        _remember(model, place, options["revision"])
    return model


def _unpacked(
    name: str, auto: Any, config: PreTrainedConfig, stored: Quantised, tensors: dict[str, Lazy], dtype: str
) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    """The class of a dense model, and the options of its `from_pretrained` that give it the tensors."""
    plain = copy.deepcopy(config)
    for one in (plain, plain.get_text_config()):
        for word in ("quantization_config", "quantization"):
            if hasattr(one, word):
                delattr(one, word)
    if dtype == "auto":
        found = getattr(plain, "dtype", None) or getattr(plain.get_text_config(), "dtype", None) or plain_type(tensors)
    else:
        found = getattr(torch, dtype)
    given = {"state_dict": dense(name, stored, tensors, config.model_type), "dtype": found}
    with foreign(f"the config of {name!r} does not fit"), torch.device("meta"):
        empty = auto.from_config(plain)  # an auto class wants a name, and a model's own takes tensors
    return type(empty), {"config": empty.config, **given}


def _remember(model: PreTrainedModel, place: str, revision: str | None) -> None:
    """What transformers reads of a model beside its weights, and can't where they are given to it."""
    model.config._name_or_path = model.name_or_path = place
    try:
        model.generation_config = transformers.GenerationConfig.from_pretrained(place, revision=revision or "main")
    except OSError:  # there is none, so the config's stands
        return
